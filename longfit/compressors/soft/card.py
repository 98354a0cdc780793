"""The model card that lies beside trained weights."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longfit.compressors.soft.base import LearnedCompressor


def _lengths(record: dict[str, Any]) -> list[str]:
    """A line on the contexts that the weights were trained on, where a recipe says it."""
    given = record.get("recipe", {}).get("context_tokens")
    if given is None:
        return []
    longest = max(tokens for _, tokens in given) if isinstance(given, list) else given
    return [f"- trained on contexts of up to {longest} tokens; longer ones are untested unless below"]


def card(record: dict[str, Any], compressor: "LearnedCompressor") -> str:
    """The README of a folder of trained weights, from what `longfit_adapter.json` says."""
    base = record["base"]
    size = sum(file["bytes"] for file in record["files"].values()) / 1e6
    ratios = ", ".join(f"{ratio}x" for ratio in record["trained_ratios"])
    options = ", ".join(f"{key}={value!r}" for key, value in record["options"].items() if value is not None)
    lines = [
        "---",
        f"base_model: {base['name']}",
        "library_name: longfit",
        "tags: [longfit, context-compression, lora]",
        "---",
        f"# {compressor.name} for {base['name']}, {ratios}",
        "",
        f"Trained weights of longfit's learned compressor `{compressor.name}` ({compressor.summary}).",
        f"{size:.1f} MB; the base model is not changed and not in here.",
        "",
        f"- trained: {compressor.trains}",
        f"- options: {options}",
        f"- steps: {record.get('steps', 'unknown')}",
        *_lengths(record),
        f"- base weights: SHA-256 {base['weights_sha256']} (sampled)",
        "",
        "```python",
        "import longfit",
        "",
        f'model, tokenizer = longfit.load("{base["name"]}")',
        f'longfit.wrap(model, "{compressor.name}", adapter="FOLDER_OR_NAME")',
        "```",
    ]
    if results := record.get("results"):
        lines += ["", "## Results", "", results]
    return "\n".join(lines).rstrip() + "\n"
