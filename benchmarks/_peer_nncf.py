"""NNCF's own quantization of an OpenVINO model, run inside NNCF's environment."""

from __future__ import annotations

import argparse
import collections

import nncf
import numpy as np
import openvino as ov


def main() -> None:
    """Quantize a file as NNCF's documentation recommends it for the CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--transformer", action="store_true")
    wanted = parser.parse_args()
    batches: dict[str, dict[str, object]] = collections.defaultdict(dict)
    for name, array in np.load(wanted.data).items():
        number, key = name.split(":", 1)
        batches[number][key] = array
    model = ov.Core().read_model(wanted.model)
    known = {name for entry in model.inputs for name in entry.names}
    fed = [{k: v for k, v in batch.items() if k in known} for batch in batches.values()]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(fed),
        subset_size=len(fed),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if wanted.transformer else None,
    )
    ov.save_model(quantized, wanted.output, compress_to_fp16=False)


if __name__ == "__main__":
    main()
