"""lm-eval's tasks on a longfit model, from Python."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.registry import model_registry

from longfit.errors import UnknownNameError
from longfit.eval.sample import in_template


def register() -> None:
    """Make lm-eval know the model ``longfit``. Again is harmless."""
    if "longfit" not in model_registry:
        model_registry.register("longfit", target="longfit.eval.lm_eval.model:LongfitLM")


def run(
    tasks: Sequence[str],
    model: Any,
    compressor: str | None = None,
    budget: str | None = None,
    *,
    limit: int | float | None = None,
    metadata: Mapping[str, Any] | None = None,
    include_path: str | Path | None = None,
    chat: bool = False,
    seed: int = 42,
    output: str | Path | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Evaluate lm-eval's ``tasks`` and, where ``output`` names a file, write the results there as JSON.

    Args:
        model, compressor, budget, arguments: of `LongfitLM`.
        limit: of requests a task, as lm-eval takes it.
        metadata: for the tasks, as {"max_seq_lengths": [4096]}; RULER's also get the model's tokenizer from here.
        include_path: a folder with more tasks in YAML.
        chat: use the tokenizer's chat template, where it has one.

    Returns:
        lm-eval's results; empty in all but the first of several processes.

    Raises:
        UnknownNameError: lm-eval has no such task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    register()
    lm = model_registry.get("longfit")(model, compressor, budget, **arguments)
    with tempfile.TemporaryDirectory() as folder:
        lm.tokenizer.save_pretrained(folder)  # RULER's tasks load it by name, and a packaged model's is not on the hub
        known = {"tokenizer": folder, **(metadata or {})}
        manager = TaskManager(include_path=str(include_path) if include_path else None, metadata=known)
        if unknown := [name for name in tasks if not name.endswith(".yaml") and not manager.match_tasks([name])]:
            raise UnknownNameError(f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
        results = simple_evaluate(
            lm,
            tasks=list(tasks),
            limit=limit,
            apply_chat_template=in_template(lm.tokenizer, chat),
            task_manager=manager,
            random_seed=seed,
            bootstrap_iters=0,
        )
    found: dict[str, Any] = dict(results or {})
    if output is not None and found:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, default=handle_non_serializable, ensure_ascii=False, indent=2)
        Path(output).write_text(text, encoding="utf-8")
    return found
