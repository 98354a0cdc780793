"""A saved document against reading it again: seconds to the first token of an answer, each in a fresh process.

    python recipes/docqa/load.py --text FILE -o runs/load [--tokens 16384] [--repeats 3]

FILE is any long text. Loading the model is in neither figure: both need it, and both processes have loaded it, and
answered a short prompt, before the clock starts. The time of the processor is given beside that on the wall, for busy
machines. "load" reads the memory from disk (which checks its hash) and asks;
"prefill" reads the document through the same method and asks. The system's file cache is warm in both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODEL, COMPRESSOR, BUDGET = "smollm2-135m", "snapkv", "25%"
QUESTION = "What is this text about?"


def prepared() -> tuple[Any, Any]:
    """The wrapped model, warm, and its tokenizer."""
    import longfit
    from longfit.docqa import ask

    model, tokenizer = longfit.load(MODEL, progress=False)
    model = longfit.wrap(model, COMPRESSOR, budget=BUDGET)
    ask(model, tokenizer, "A short text that warms up. " * 60, QUESTION, max_new_tokens=2)
    return model, tokenizer


def document(tokenizer: Any, text: Path, tokens: int) -> str:
    """The beginning of the text, so long that the context has so many tokens, to a few."""
    from longfit.docqa.tokens import tokenised

    whole = text.read_text(encoding="utf-8", errors="ignore").strip()
    ids, starts = tokenised(tokenizer, whole[: 12 * tokens])
    if len(ids) < tokens:
        raise SystemExit(f"{text} has {len(ids)} tokens, fewer than {tokens}")
    return whole[: starts[tokens - 40]]


def child(how: str, text: Path, tokens: int, folder: Path) -> dict[str, Any]:
    """One measurement, in this process."""
    import longfit
    from longfit.docqa import ask_memory, compress

    model, tokenizer = prepared()
    given = "" if how == "load" else document(tokenizer, text, tokens)
    started, cpu = time.perf_counter(), time.process_time()
    memory = longfit.Memory.load(folder, model) if how == "load" else compress(model, tokenizer, given)
    ready = time.perf_counter()
    answer = ask_memory(model, tokenizer, memory, QUESTION, max_new_tokens=1)
    done, used = time.perf_counter(), time.process_time() - cpu
    if how == "save":
        memory.save(folder)
    return {
        "how": "prefill" if how == "save" else how,
        "ready_seconds": ready - started,
        "first_token_seconds": done - started,
        "cpu_seconds": used,
        "answer": answer.text,
        "tokens_in": memory.tokens_in,
        "kept_tokens": memory.kept_tokens,
        "kv_bytes": memory.kv_bytes,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.output / "document.ctx"
    if given.child:
        print(json.dumps(child(given.child, given.text, given.tokens, folder)))
        return
    given.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for how in ["save", *["load"] * 3, *["prefill", "load"] * (given.repeats - 1)]:
        call = [sys.executable, *sys.argv, "--child", how]
        rows.append(json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout))
        (given.output / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
    times, cpu = (
        {how: [r[name] for r in rows if r["how"] == how] for how in ("load", "prefill")}
        for name in ("first_token_seconds", "cpu_seconds")
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    ratios = [statistics.median(t["prefill"]) / statistics.median(t["load"]) for t in (times, cpu)]
    heads = ["tokens", "kept a layer", "on disk", "load and first token", "prefill and first token", "ratio"]
    print(f"| {' | '.join(heads)} | ratio in CPU time |\n{'|---' * (len(heads) + 1)}|")
    shown = ["/".join(f"{t:.2f}" for t in times[how]) for how in ("load", "prefill")]
    print(
        f"| {rows[0]['tokens_in']:,} | {rows[0]['kept_tokens']:,.0f} | {size / 2**20:.1f} MiB | {shown[0]} s | "
        f"{shown[1]} s | {ratios[0]:.0f} | {ratios[1]:.0f} |"
    )
    answers = {r["answer"] for r in rows}
    print(f"\nfirst tokens: {'the same in all' if len(answers) == 1 else sorted(answers)}")


if __name__ == "__main__":
    main()
