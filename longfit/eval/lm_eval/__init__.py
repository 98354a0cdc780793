"""``longfit`` as a model of lm-evaluation-harness (EleutherAI, lm-eval 0.4.13).

    accelerate launch -m longfit.eval.lm_eval --model longfit --tasks niah_single_1 \\
        --model_args pretrained=smollm2-135m,compressor=snapkv,budget=25%,aware=false

lm-eval hands over one prompt; compressing before the question is known needs it in two parts, which `split_request`
finds by the request's document. Deviations from ``--model hf``, with a compressor only (without one, this is HFLM):

- The two parts are tokenised apart, as `longfit.eval.sample` does, and one request runs at a time.
- A long prompt is never truncated; ``batch_size`` is not used.
- Rolling log-likelihood is refused: it would score the text that is being compressed.
"""

from longfit.errors import InputError

try:
    from longfit.eval.lm_eval.model import LongfitLM
    from longfit.eval.lm_eval.run import register, run
except ImportError as missing:
    raise InputError(f'{missing}; install it: pip install "longfit[lm-eval]"') from missing
from longfit.eval.lm_eval.split import split_request

__all__ = ["LongfitLM", "register", "run", "split_request"]
