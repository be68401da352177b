"""torchao's X86InductorQuantizer on an exported program, run inside torchao's environment."""

from __future__ import annotations

import argparse
import collections

import numpy as np
import torch
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86


def main() -> None:
    """Quantize a program as torchao's documentation recommends it for inductor on x86."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--transformer", action="store_true")
    wanted = parser.parse_args()
    batches: dict[str, dict[str, torch.Tensor]] = collections.defaultdict(dict)
    for name, array in np.load(wanted.data).items():
        number, key = name.split(":", 1)
        batches[number][key] = torch.from_numpy(array)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.load(wanted.model).module(check_guards=False), quantizer)
    with torch.no_grad():
        for batch in batches.values():
            prepared(batch)
        converted = move_exported_model_to_eval(convert_pt2e(prepared))
        example = next(iter(batches.values()))
        axes = (0, 1) if wanted.transformer else (0,)
        shapes = {key: dict.fromkeys(axes, torch.export.Dim.AUTO) for key in example}
        program = torch.export.export(converted, (example,), dynamic_shapes=(shapes,))
    torch.export.save(program, wanted.output)


if __name__ == "__main__":
    main()
