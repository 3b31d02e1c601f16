"""Cold start of the tokenizer: a fresh process imports, builds and encodes, here and with the tokenizers library.

    python benchmarks/tokenizer.py [GGUF]

The library's tokenizer is loaded from the tokenizer.json that it writes itself. Prints the best of several processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers

from gemma_mtp.checkpoints.demo import demo_path
from gemma_mtp.checkpoints.gguf import GGUF

PROCESSES = 10
PROMPTS = {
    "20 tokens": "The quick brown fox jumps over the lazy dog, and then it sleeps until the next day.",
    "30,000 tokens": "In words like these, 1,234 of them (more or less), nothing repeats until the line ends.\n" * 1250,
}
OURS = """
from gemma_mtp.checkpoints.gguf import GGUF
metadata = GGUF.open(PATH).metadata
start = time.perf_counter()
from gemma_mtp.text.tokenizer import Tokenizer
imported = time.perf_counter()
tokenizer = Tokenizer.from_gguf(metadata)
built = time.perf_counter()
count = len(tokenizer.encode(TEXT, bos=False))
"""
LIBRARY = """
start = time.perf_counter()
from tokenizers import Tokenizer
imported = time.perf_counter()
tokenizer = Tokenizer.from_file(PATH)
built = time.perf_counter()
count = len(tokenizer.encode(TEXT).ids)
"""
END = """
print(json.dumps([imported - start, built - imported, time.perf_counter() - built, count]))
"""


def library_file(path: Path, folder: Path) -> Path:
    """The same vocabulary as the library's tokenizer.json."""
    metadata = GGUF.open(path).metadata
    tokens = ["▁" * len(text) if not text.strip(" ") else text for text in metadata["tokenizer.ggml.tokens"].tolist()]
    ids = {token: id for id, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in metadata:
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"].tolist()]
    else:
        splits = ((ids[token], -at, token[:at], token[at:]) for token in tokens for at in range(1, len(token)))
        merges = [(left, right) for _, _, left, right in sorted(s for s in splits if s[2] in ids and s[3] in ids)]
    library = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.save(str(folder / "tokenizer.json"), pretty=False)
    return folder / "tokenizer.json"


def measure(program: str, path: Path, text: str) -> list[float]:
    """The best of several processes: seconds to import, build, encode; tokens."""
    whole = f"import json, time\nPATH, TEXT = {str(path)!r}, {text!r}\n{program}{END}"
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", whole])) for _ in range(PROCESSES)]
    return [min(column) for column in zip(*runs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Cold start of the tokenizer, here and with the tokenizers library.")
    parser.add_argument("gguf", nargs="?", type=Path, help="default: the demo model")
    path = parser.parse_args().gguf or demo_path()
    with tempfile.TemporaryDirectory() as folder:
        programs = {"gemma_mtp": (OURS, path), "tokenizers": (LIBRARY, library_file(path, Path(folder)))}
        print("milliseconds             import   build   encode   tokens")
        for name, text in PROMPTS.items():
            for who, (program, file) in programs.items():
                imported, built, encoded, tokens = measure(program, file, text)
                print(f"{who:10} {name:13} {1e3 * imported:7.1f} {1e3 * built:7.1f} {1e3 * encoded:8.2f} {tokens:8.0f}")


if __name__ == "__main__":
    main()
