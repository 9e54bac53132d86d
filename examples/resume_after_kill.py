"""Kill a training run in the middle of an epoch, resume it from the shell, and prove that nothing was lost.

python examples/resume_after_kill.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

KILL_AT, EPOCHS = 100, 4


def train(run_dir: str) -> None:
    import lightning as L
    from lightning_fit import DigitClassifier

    from ckptmgr import CheckpointManager

    class Recorder(DigitClassifier):
        """Remembers, as part of its state, which samples it was trained on."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def training_step(self, batch, batch_idx):
            if self.global_step == int(os.environ.get("KILL_AT", -1)):
                os.kill(os.getpid(), signal.SIGKILL)
            images, labels, indices = batch
            self.seen += indices.tolist()
            return nn.functional.cross_entropy(self.network(images), labels)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["seen"] = list(self.seen)

        def on_load_checkpoint(self, checkpoint):
            self.seen = list(checkpoint["seen"])

    L.seed_everything(1, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target), torch.arange(len(images)))
    manager = CheckpointManager(run_dir, every_n_train_steps=30)
    trainer = L.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_model_summary=False, callbacks=[manager]
    )
    model = Recorder()
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
    torch.save(model.state_dict(), Path(run_dir) / "final.pt")
    (Path(run_dir) / "seen.json").write_text(json.dumps(model.seen))


def prove(root: Path) -> None:
    whole, killed = str(root / "uninterrupted"), str(root / "killed")
    ckptmgr = [sys.executable, "-m", "ckptmgr"]
    subprocess.run([sys.executable, __file__, whole], check=True)
    code = subprocess.run([sys.executable, __file__, killed], env={**os.environ, "KILL_AT": str(KILL_AT)}).returncode
    print(
        f"\nkilled by signal {-code} in the middle of epoch {KILL_AT // 57}; now: ckptmgr resume {killed}\n", flush=True
    )
    subprocess.run([*ckptmgr, "resume", killed], check=True)

    weights = [torch.load(Path(run) / "final.pt") for run in (whole, killed)]
    seen = [json.loads((Path(run) / "seen.json").read_text()) for run in (whole, killed)]
    same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    counts = Counter(seen[1])
    repeated, skipped = sum(n > EPOCHS for n in counts.values()), sum(counts[i] < EPOCHS for i in set(seen[0]))
    print(f"\nfinal weights bit-identical to the uninterrupted run: {'yes' if same else 'NO'}")
    print(f"samples repeated: {repeated}, samples skipped: {skipped}, same order: {seen[0] == seen[1]}\n", flush=True)
    subprocess.run([*ckptmgr, "ls", killed], check=True)
    assert code == -signal.SIGKILL
    assert same
    assert seen[0] == seen[1]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1])
    else:
        folder = Path(tempfile.mkdtemp(prefix="ckptmgr-demo-"))
        prove(folder)
        shutil.rmtree(folder)
