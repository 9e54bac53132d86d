"""Kill a training run in the middle of an epoch, resume it from the shell, and prove that nothing was lost."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

KILL_AT, EPOCHS = 100, 4


def train(run_dir: Path) -> None:
    import lightning as L
    from lightning_fit import CheckpointManager, DigitClassifier, read_digits

    class Recorder(DigitClassifier):
        seen: tuple[int, ...] = ()  # which samples it was trained on: part of its state

        def training_step(self, batch, batch_idx):
            if self.global_step == int(os.environ.get("KILL_AT", -1)):
                os.kill(os.getpid(), signal.SIGKILL)
            *images_and_labels, indices = batch
            self.seen += tuple(indices.tolist())
            return super().training_step(images_and_labels, batch_idx)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["seen"] = self.seen

        def on_load_checkpoint(self, checkpoint):
            self.seen = checkpoint["seen"]

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(1, verbose=False)
    images, labels = read_digits().tensors
    data = TensorDataset(images, labels, torch.arange(len(images)))
    quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    model, manager = Recorder(), CheckpointManager(run_dir, every_n_train_steps=30)
    trainer = L.Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[manager], **quiet)
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
    torch.save(model.state_dict(), run_dir / "final.pt")
    (run_dir / "seen.json").write_text(json.dumps(model.seen))


def shell(*argv: object, **environment: str) -> int:
    return subprocess.run([sys.executable, *map(str, argv)], env={**os.environ, **environment}).returncode


def prove(whole: Path, killed: Path) -> None:
    os.environ["PYTHONWARNINGS"] = "ignore"
    print(f"1. train a CNN on handwritten digits for {EPOCHS} epochs, without interruption", flush=True)
    assert shell(__file__, whole) == 0
    print(f"2. train it again, and SIGKILL it at step {KILL_AT}, in the middle of an epoch", flush=True)
    assert shell(__file__, killed, KILL_AT=str(KILL_AT)) == -signal.SIGKILL
    print(f"3. ckptmgr resume {killed}", flush=True)
    assert shell("-m", "ckptmgr", "resume", killed) == 0

    weights = [torch.load(run / "final.pt") for run in (whole, killed)]
    seen = [Counter(json.loads((run / "seen.json").read_text())) for run in (whole, killed)]
    identical = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    repeated, skipped = (seen[1] - seen[0]).total(), (seen[0] - seen[1]).total()
    print(f"\nfinal weights bit-identical to the uninterrupted run: {'yes' if identical else 'NO'}")
    print(f"samples repeated {repeated}, samples skipped {skipped}\n", flush=True)
    assert shell("-m", "ckptmgr", "ls", killed) == 0
    assert (identical, repeated, skipped) == (True, 0, 0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(prefix="ckptmgr-demo-") as folder:
            prove(Path(folder) / "uninterrupted", Path(folder) / "killed")
