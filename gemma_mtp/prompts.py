"""Prompts of the nine kinds that speculative decoding is commonly measured on, written as texts to be continued, so
that base and instruction-tuned models both go on with them."""

NINE_KINDS: dict[str, str] = {
    "python": (
        "# inventory.py: keeps track of the parts in a small workshop.\n\n"
        "from dataclasses import dataclass, field\n\n\n"
        "@dataclass\nclass Part:\n    name: str\n    price: float\n    count: int = 0\n\n\n"
        "@dataclass\nclass Inventory:\n    parts: dict[str, Part] = field(default_factory=dict)\n\n"
        "    def add(self, name: str, price: float, count: int = 1) -> None:\n"
        '        """Adds `count` pieces of a part, creating it when it is new."""\n'
    ),
    "cpp": (
        "// ring_buffer.h: a queue of fixed size that overwrites its oldest element when full.\n"
        "#pragma once\n#include <array>\n#include <cstddef>\n\n"
        "template <typename T, std::size_t N>\nclass RingBuffer {\npublic:\n"
        "    bool empty() const { return size_ == 0; }\n"
        "    bool full() const { return size_ == N; }\n\n"
        "    void push(const T& value) {\n"
    ),
    "explain": (
        "Why is the sky blue? Sunlight looks white, but it is a mixture of all colours, each a wave of another length. "
        "When it meets the molecules of the air, short waves are scattered far more strongly than long ones. "
        "This is called Rayleigh scattering, and it means that"
    ),
    "summarise": (
        "Minutes of the town council. The council met on Tuesday evening to discuss the old bridge over the mill "
        "stream. The engineer reported cracks in two of the four stone piers and recommended closing the bridge to "
        "lorries at once. Repairs would take eight months and cost about 400,000; a new bridge would take two years "
        "and cost three times as much. Shop owners on the far bank feared for their trade and asked for a ferry for "
        "pedestrians. The council voted seven to four to repair the old bridge and to run a ferry until the work is "
        "done.\n\n"
        "Summary in two sentences: The council"
    ),
    "facts": (
        "Q: What is the capital of Norway?\nA: Oslo.\n"
        "Q: Which planet has the most mass?\nA: Jupiter.\n"
        "Q: Who wrote the novel Pride and Prejudice?\nA: Jane Austen.\n"
        "Q: What is the chemical symbol of gold?\nA: Au.\n"
        "Q: In which year did people first walk on the Moon?\nA:"
    ),
    "translate": (
        "English: Good morning, how are you?\nGerman: Guten Morgen, wie geht es Ihnen?\n"
        "English: The train to Hamburg leaves at nine.\nGerman: Der Zug nach Hamburg fährt um neun Uhr ab.\n"
        "English: Where can I buy a ticket?\nGerman: Wo kann ich eine Fahrkarte kaufen?\n"
        "English: My brother lives in a small house by the sea.\nGerman:"
    ),
    "story": (
        "The lighthouse keeper had not spoken to anyone for eleven days when the letter came. It lay on the kitchen "
        "table, dry, although the storm had not let up, and the door had been locked from the inside. She"
    ),
    "maths": (
        "Problem: A baker sells loaves at 3 each and rolls at 0.50 each. On Monday she sold 40 loaves and twice as "
        "many rolls. Her flour cost 35. What was her profit?\n"
        "Solution, step by step.\n"
        "Step 1: The loaves brought in 40 x 3 = 120.\n"
        "Step 2: The number of rolls was 2 x 40 = 80.\n"
        "Step 3:"
    ),
    "review": (
        "Please review this function.\n\n```python\n"
        "def merge_intervals(intervals):\n"
        "    intervals.sort()\n"
        "    result = []\n"
        "    for start, end in intervals:\n"
        "        if result and start <= result[-1][1]:\n"
        "            result[-1][1] = max(result[-1][1], end)\n"
        "        else:\n"
        "            result.append([start, end])\n"
        "    return result\n\n\n"
        "def covered_length(intervals):\n"
        "    total = 0\n"
        "    for start, end in merge_intervals(intervals):\n"
        "        total += end - start\n"
        "    return total\n\n\n"
        "def gaps(intervals, low, high):\n"
        "    position = low\n"
        "    result = []\n"
        "    for start, end in merge_intervals(intervals):\n"
        "        if start > position:\n"
        "            result.append([position, start])\n"
        "        position = max(position, end)\n"
        "    if position < high:\n"
        "        result.append([position, high])\n"
        "    return result\n```\n\n"
        "Review:\n\n1. `merge_intervals` sorts the list it is given in place, so the caller's list changes. Use "
        "`sorted(intervals)` instead:\n\n```python\ndef merge_intervals(intervals):\n"
    ),
}
