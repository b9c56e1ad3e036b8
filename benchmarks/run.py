"""Run all benchmarks, one after the other, and write benchmarks/RESULTS.md.

python benchmarks/run.py [survey finercut speed damage quality mixed latency rewrites streaming study] [-- options]

Without names: all but the last four: two take an hour, two much disk and real models made by tools/.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ALL = ("survey", "finercut", "speed", "damage", "quality", "mixed")
APART = ("latency", "rewrites", "streaming", "study")
TITLES = {
    "survey": "The survey against one plain forward",
    "finercut": "FinerCut's search",
    "speed": "Realised against promised speed-up",
    "damage": "Predicted damage against exact leave-one-out",
    "quality": "Quality without healing at the same number of parameters",
    "mixed": "Mixed plans at equal bytes, and predicted against measured damage",
    "latency": "Latency promised and measured",
    "rewrites": "Every kind of rewrite at one budget",
    "streaming": "A survey of 7 billion parameters from disk",
    "study": "Which measure predicts the damage of leaving a site out",
}


def main() -> None:
    """Each benchmark in a process of its own; a section is replaced only when its run ended well."""
    words = sys.argv[1:]
    options = words[words.index("--") + 1 :] if "--" in words else []
    names = [w for w in words[: len(words) - len(options)] if w != "--"] or list(ALL)
    path = HERE / "RESULTS.md"
    sections = dict.fromkeys((*ALL, *APART), "")
    for part in path.read_text(encoding="utf-8").split("\n## ")[1:] if path.is_file() else ():
        name = next((n for n, title in TITLES.items() if part.startswith(title)), None)
        if name:
            sections[name] = part.split("\n", 1)[1].strip()
    for name in names:
        print(f"{name} …", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), *options]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        print(out, flush=True)
        line = " ".join(["python", f"benchmarks/{name}.py", *(Path(o).name if "/" in o else o for o in options)])
        sections[name] = f"`{line}`, {datetime.date.today()}\n\n{out}"
        body = "".join(f"\n## {TITLES[n]}\n\n{text}\n" for n, text in sections.items() if text)
        path.write_text("# Results\n\nRatios and counts of single runs; see each script.\n" + body, encoding="utf-8")


if __name__ == "__main__":
    main()
