"""Two processes are one process with the same global batch."""

from collections.abc import Callable

import pytest
import torch

SGD = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.3", "--model.lr_schedule=Constant")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_two_processes_learn_what_one_learns_from_the_same_rows(tiny_cli: Callable):
    steps = "--trainer.max_steps=3", "--trainer.accumulate_grad_batches=2", "--data.valid_share=0.3"
    often = "--monitor.every_n_steps=1", "--trainer.val_check_interval=2"
    runs = {}
    for num_processes, strategy in ((1, "auto"), (2, "ddp_fork")):
        cli = tiny_cli(
            "wave",
            *SGD,
            *steps,
            *often,
            f"--trainer.devices={num_processes}",
            f"--trainer.strategy={strategy}",
            f"--data.batch_size={4 // num_processes}",
        )
        start = {name: value.clone() for name, value in cli.model.state_dict().items()}
        cli.trainer.fit(cli.model, cli.datamodule)
        runs[num_processes] = {name: value.clone() for name, value in cli.model.state_dict().items()}
    moved = max(float((runs[1][name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3
    for name, value in runs[1].items():
        torch.testing.assert_close(runs[2][name], value, rtol=1e-5, atol=1e-5, msg=name)
