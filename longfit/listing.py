"""What there is to choose from, as mappings and as text."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from longfit.errors import UnknownNameError
from longfit.shapes import ModelShape

KINDS = {
    "kv": "KV compressors: what the cache keeps",
    "learned": "Learned compressors: the context becomes fewer slots",
    "prompt": "Prompt compressors: the prompt becomes shorter before it is read",
}

# The model for which bytes are stated: SmolLM2-135M in bfloat16.
REFERENCE = ModelShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
)


def listing(what: str) -> list[dict[str, Any]]:
    """One mapping of facts per compressor, attention patch, adapter, model, recipe or task.

    Raises:
        UnknownNameError: there is no such list.
    """
    if what == "compressors":
        from longfit.compressors import available, get

        return [_facts(get(name)) for name in available()]
    if what == "attention":
        from longfit.attention import available as patches

        return [_patch_facts(name, patch) for name, patch in patches().items()]
    if what == "adapters":
        from longfit.compressors.soft.artifact import find, shipped_names

        return [_adapter_facts(name, find(name).facts) for name in shipped_names()]
    if what == "models":
        from longfit.packaged import PACKAGED_MODELS, is_cached

        return [
            {"name": name, "summary": model.description, "ready": is_cached(name)}
            for name, model in PACKAGED_MODELS.items()
        ]
    if what == "recipes":
        return [{"name": str(path), "summary": _first_comment(path)} for path in _recipes()]
    if what == "tasks":
        from longfit.eval.suites import SUITES, tasks_of

        return [
            {"name": f"{suite}/{name}", "summary": task.metric}
            for suite in SUITES
            for name, task in tasks_of(suite).items()
        ]
    raise UnknownNameError(
        f"there is no list of {what!r}; there are compressors, attention, adapters, models, recipes and tasks"
    )


def _facts(method: Any) -> dict[str, Any]:
    shown = {name: value if _plain(value) else repr(value) for name, value in method.options().items()}
    if hasattr(method, "choose"):
        return {
            "name": method.name,
            "summary": method.summary,
            "kind": "prompt",
            "question_aware": bool(method.query_aware),
            "scores": method.scores,
            "reads_the_text": bool(method.reads),
            "options": shown,
            "deviations": method.deviations,
            "source": method.source,
        }
    if hasattr(method, "memory"):
        return {
            "name": method.name,
            "summary": method.summary,
            "kind": "learned",
            "memory": method.memory,
            "trains": method.trains,
            "needs_training": bool(method.needs_training),
            "slots_per_1000_tokens": method.slots_for(1000),
            "bytes_per_1000_tokens": method.bytes_for(1000, REFERENCE),
            "question_aware": bool(method.query_aware),
            "options": shown,
            "left_out": method.left_out,
            "source": method.source,
        }
    return {
        "name": method.name,
        "summary": method.summary,
        "kind": "kv",
        "question_aware": bool(method.query_aware),
        "phases": list(method.phases),
        "geometry": method.geometry,
        "needs_queries": bool(method.needs_queries),
        "replays": bool(method.replays),
        "options": shown,
        "source": method.source,
    }


def _patch_facts(name: str, patch: Any) -> dict[str, Any]:
    options = {f.name: f.default for f in fields(patch) if f.default is not MISSING}
    return {
        "name": name,
        "summary": patch.summary,
        "phases": list(patch.phases),
        "stores": patch.stores,
        "past_the_window": patch.extends,
        "options": {name: value if _plain(value) else repr(value) for name, value in options.items()},
        "source": patch.source,
    }


def _adapter_facts(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "summary": f"trained weights of {facts['method']} for {facts['base']['name']}",
        "ratios": [str(ratio) for ratio in facts["trained_ratios"]],
        "steps": facts["steps"],
    }


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _recipes() -> list[Path]:
    """Recipe files below the working directory, or else beside the package in a checkout."""
    beside = Path(__file__).resolve().parent.parent / "recipes"
    folder = next((place for place in (Path("recipes"), beside) if place.is_dir()), None)
    return sorted(folder.rglob("*.yaml")) if folder else []


def _first_comment(path: Path) -> str:
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def blocks(rows: list[dict[str, Any]]) -> str:
    """A line with name and summary per row, and under it what else is known; rows of each kind under a heading."""
    kinds = dict.fromkeys(row.get("kind") for row in rows)
    if len(kinds) > 1:
        parts = [(KINDS[kind], blocks([row for row in rows if row["kind"] == kind])) for kind in KINDS if kind in kinds]
        return "\n\n".join(f"{heading}\n\n{text}" for heading, text in parts)
    width = max((len(row["name"]) for row in rows), default=0)
    lines = []
    for row in rows:
        lines.append(f"{row['name']:<{width}}  {row['summary']}".rstrip())
        more = {key: value for key, value in row.items() if key not in ("name", "summary", "kind") and value}
        if more:
            shown = (_shown(key, value) for key, value in more.items())
            lines.append(" " * (width + 2) + "; ".join(shown))
    return "\n".join(lines) or "nothing found"


def _shown(key: str, value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{name}={option}" for name, option in value.items())
    if isinstance(value, list):
        value = "+".join(value)
    if key == "bytes_per_1000_tokens":
        value = f"{value:,} (SmolLM2-135M, bf16)"
    label = key.replace("_", " ").removesuffix(" aware")
    return {
        "question": "looks at the question",
        "ready": "ready in the cache folder",
        "reads the text": "a language model reads the text",
    }.get(label, label if value is True else f"{label} {value}")
