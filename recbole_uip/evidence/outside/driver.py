"""FuxiCTR's DeepFM on the files of one arm; runs where FuxiCTR is, not where this package is.

``python -I driver.py FOLDER SEED`` reads the folder's ``dataset_config.yaml`` and
``model_config.yaml``, FuxiCTR's own files, and leaves ``result.json`` and ``scores.npz`` there.
Without arguments it prints the versions of FuxiCTR and torch as JSON. The folder has this file
and nothing else of the package in it, so it imports nothing of it.

FuxiCTR encodes the columns, shuffles, trains, stops early, keeps the best weights and computes
AUC and LogLoss. Its package on PyPI has the parts of its DeepFM but not their sum, which lies in
the ``model_zoo`` of its repository: the sum is here.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path

__all__ = ["EXPERIMENT", "INSTALL", "VERSION", "main"]

VERSION = "2.3.10"  # of FuxiCTR, the one this was written with
INSTALL = (
    "python3 -m venv fuxictr-env",
    f"fuxictr-env/bin/pip install torch fuxictr=={VERSION}",
)
EXPERIMENT = "DeepFM"  # the name of the experiment in model_config.yaml
SPLITS = ("train", "valid", "test")


def main(arguments: list[str]) -> None:
    """Train on ``FOLDER`` with ``SEED``, or print versions."""
    import fuxictr
    import torch
    from fuxictr.pytorch.torch_utils import seed_everything
    from fuxictr.utils import load_config

    # FuxiCTR's own __version__ lags behind its releases.
    versions = {
        "fuxictr": importlib.metadata.version(fuxictr.__name__),
        "torch": torch.__version__,
    }
    if not arguments:
        print(json.dumps(versions))
        return
    folder, seed = Path(arguments[0]), int(arguments[1])
    params = load_config(str(folder), EXPERIMENT)
    files = {split: folder / f"{split}.npz" for split in SPLITS}
    feature_map = _encode(folder, params, files)
    seed_everything(seed)
    result = _train(params, feature_map, files)
    (folder / "result.json").write_text(json.dumps({**result, "versions": versions}))


def _encode(folder: Path, params: dict, files: dict[str, Path]):
    """Number the tokens by FuxiCTR's processor, fitted on the training rows."""
    import numpy as np
    from fuxictr.features import FeatureMap
    from fuxictr.preprocess import FeatureProcessor

    processor = FeatureProcessor(**params)
    frames = {
        split: processor.preprocess(
            processor.read_data(params[f"{split}_data"], data_format=params["data_format"])
        )
        for split in SPLITS
    }
    processor.fit(frames["train"])
    for split, frame in frames.items():
        table = frame.collect()
        # FuxiCTR's build_dataset does the same in workers of a Ray cluster that it starts first.
        columns = processor.transform({name: table[name].to_numpy() for name in table.columns})
        np.savez(files[split], **columns)
    feature_map = FeatureMap(params["dataset_id"], str(folder))
    feature_map.load(processor.json_file, params)
    return feature_map


def _train(params: dict, feature_map, files: dict[str, Path]) -> dict:
    import numpy as np
    from fuxictr.pytorch.dataloaders import RankDataLoader

    model = _deepfm(params, feature_map)
    Path(model.model_dir).mkdir(parents=True, exist_ok=True)
    train, valid, test = RankDataLoader(
        feature_map,
        stage="both",
        train_data=str(files["train"]),
        valid_data=str(files["valid"]),
        test_data=str(files["test"]),
        batch_size=params["batch_size"],
        shuffle=True,
        data_format="npz",
        num_workers=0,
    )
    started = time.perf_counter()
    model.fit(train, epochs=params["epochs"], validation_data=valid)
    result = {"seconds": time.perf_counter() - started, "epochs": model._epoch_index + 1}
    scores = {}
    for split, data in (("valid", valid), ("test", test)):
        metrics = model.evaluate(data)
        result[split] = {"auc": float(metrics["AUC"]), "logloss": float(metrics["logloss"])}
        scores[split] = model.predict(data)
    np.savez(files["test"].with_name("scores.npz"), **scores)
    result["parameters"] = sum(weights.numel() for weights in model.parameters())
    return result


def _deepfm(params: dict, feature_map):
    """DeepFM (arXiv 1703.04247), y = sigmoid(FM(x) + MLP(x)), of FuxiCTR's parts."""
    from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
    from fuxictr.pytorch.models import BaseModel

    class DeepFM(BaseModel):
        def __init__(self):
            super().__init__(feature_map, **params)
            self.vectors = FeatureEmbedding(feature_map, params["embedding_dim"])
            self.wide = FactorizationMachine(feature_map)
            self.deep = MLP_Block(
                feature_map.sum_emb_out_dim(),
                hidden_units=params["hidden_units"],
                dropout_rates=params["net_dropout"],
                output_dim=1,
            )
            self.compile(params["optimizer"], params["loss"], params["learning_rate"])
            self.reset_parameters()
            self.model_to_device()

        def forward(self, inputs):
            columns = self.get_inputs(inputs)
            vectors = self.vectors(columns)
            logit = self.wide(columns, vectors) + self.deep(vectors.flatten(1))
            return {"y_pred": self.output_activation(logit)}

    return DeepFM()


if __name__ == "__main__":
    main(sys.argv[1:])
