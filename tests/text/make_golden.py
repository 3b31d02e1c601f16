"""Writes golden.json: what transformers makes of the corpus with the demo model's tokenizer.

python tests/text/make_golden.py
"""

import json
from pathlib import Path

from corpus import CORPUS
from transformers import AutoTokenizer

from gemma_mtp.checkpoints.demo import demo_path

if __name__ == "__main__":
    path = demo_path()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    golden = {
        name: [tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"] for text in CORPUS]
        for name, split in (("special", False), ("plain", True))
    }
    lines = ",\n".join(f'"{name}": [\n' + ",\n".join(map(json.dumps, ids)) + "\n]" for name, ids in golden.items())
    Path(__file__).with_name("golden.json").write_text("{\n" + lines + "\n}\n")
