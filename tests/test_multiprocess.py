"""Two communicating processes train like one, write once, and hand their checkpoints over."""

import dataclasses
import socket

import jax
import pytest

from lintime.train import loop
from tests.tiny import command, quick, read_lines, tiny_run, write_config, write_text

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_two(*arguments, **kwargs) -> list[str]:
    """The same command in two processes of two devices each; their outputs."""
    join = ("--coordinator", f"localhost:{free_port()}", "--processes", 2, "--process-index")
    both = [command(*arguments, *join, i, devices=2, **kwargs) for i in range(2)]
    try:
        outputs = [p.communicate(timeout=150)[0] for p in both]
    finally:
        for p in both:
            p.kill()
    assert [p.returncode for p in both] == [0, 0], outputs
    return outputs


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_two_processes_train_like_one_and_hand_over(tmp_path):
    run = tiny_run(
        write_text(tmp_path / "text.txt"), "steps=10", "checkpoint.every=4", "eval.every=5",
        "optim.accumulate=2", "mesh.fsdp=2", "net.d_model=32", "net.dropout_res=0.1",
        "ema.decay=0.9", "optim.decay_steps=10",
    )  # fmt: skip
    config = write_config(run, tmp_path)
    two, one = tmp_path / "two", tmp_path / "one"
    cache = tmp_path / "compiled"
    outputs = run_two("train", config, "steps=6", "--run", two, cache=cache)
    assert "4 cpu device(s)" in outputs[0] and "gzip -9" in outputs[0] and "next:" in outputs[0]
    assert "step 6/6" not in outputs[1]  # one process speaks, one process writes
    assert [line["step"] for line in read_lines(two)] == [1, 2, 3, 4, 5, 5, 6, 6]
    assert {p.name for p in (two / "checkpoints").iterdir()} == {"4", "6"}

    # Two processes began, one goes on, two finish; the other run was never interrupted.
    with quick():
        loop.train(dataclasses.replace(run, steps=8), two, devices=jax.devices()[:4])
        loop.train(run, one, devices=jax.devices()[:4])
    run_two("train", config, "--run", two, cache=cache)
    for key in ("loss", "grad_norm", "val_loss"):
        got, expected = (
            {line["step"]: line[key] for line in read_lines(f) if key in line} for f in (two, one)
        )
        assert expected and {n: got[n] for n in expected} == pytest.approx(expected, rel=2e-4)
