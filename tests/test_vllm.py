"""What a vLLM server says about an exported memory is what longfit says. Runs where a vLLM is named:

    LONGFIT_VLLM=VENV/bin/vllm python -m pytest tests/test_vllm.py

(vLLM pins its own torch and transformers, so it lives in an environment of its own.)
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import longfit
from longfit.export import export_prompt_embeds

VLLM = os.environ.get("LONGFIT_VLLM", "")
DOCUMENT = (
    "The history of the town is long. The lamp is red. It was built on a hill above the river. The captain of the ship "
    "is Oliver. In spring the market opens at nine. The door is green. Many visitors come by train. The box is blue."
)
SHIPPED = {"mean_pool": "smollm2-135m-mean-pool-4x"}
STARTING_SECONDS = 600

pytestmark = [pytest.mark.real, pytest.mark.skipif(not VLLM, reason="LONGFIT_VLLM names no vllm command")]


@contextmanager
def serving(model: str, folder: str, log: str, options: list[str]):
    """A server of the model, started in `folder`; gives its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [VLLM, "serve", model, "--port", str(port), "--enforce-eager", "--max-model-len", "512", *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(log, "w") as out:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
    address, started = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            assert server.poll() is None and time.monotonic() - started < STARTING_SECONDS, Path(log).read_text()[
                -4000:
            ]
            try:
                urllib.request.urlopen(address + "/health").close()
                break
            except urllib.error.URLError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def before_a_tie(scores) -> int:
    """How many tokens come before two are as likely as each other, to bf16: there two engines may part ways."""
    best = torch.stack([given[0].float().topk(2).values for given in scores])
    near = (best[:, 0] - best[:, 1] < 0.25).nonzero()
    return int(near[0]) if len(near) else len(best)


@pytest.mark.parametrize("name", ["icae", "mean_pool"])
def test_the_client_and_a_server_started_as_it_says_answer_as_longfit_does(name, tmp_path):
    model, tokenizer = longfit.load("smollm2-135m", dtype="bfloat16", progress=False)
    base = str(tmp_path / "base")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = longfit.wrap(model, name, adapter=SHIPPED.get(name, "untrained"))
    memory = model.compress(tokenizer(DOCUMENT, return_tensors="pt").input_ids)
    question = "\nThe door is"
    ids = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        how = {"max_new_tokens": 64, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        out = model.generate(ids, memory=memory, **how)
    expected = tokenizer.decode(out.sequences[0, ids.shape[1] :][: before_a_tie(out.scores)], skip_special_tokens=True)
    folder = tmp_path / "exported"
    export_prompt_embeds(memory, model, folder)
    said = (folder / "client.py").read_text().split("vllm serve MODEL ")[1].split("\n")[0].split()
    with serving(base, str(folder), str(tmp_path / "server.log"), said) as address:
        client = [sys.executable, str(folder / "client.py"), base, question, address]
        text = subprocess.run(client, check=True, capture_output=True, text=True).stdout
    assert len(expected.split()) >= 2 and text.startswith(expected)
