"What several test folders compare by"
import torch

PRECISIONS = {"f64": torch.float64, "f32": torch.float32}
TOLERANCES = {"f64": {"rtol": 1e-9, "atol": 1e-12}, "f32": {"rtol": 2e-5, "atol": 2e-7},
              "f32 trained": {"rtol": 1e-4, "atol": 2e-7}} # after two whole iterations


def near(found, wanted, precision):
    "Within the tolerance of recorded numbers"
    torch.testing.assert_close(found, wanted.to(found.dtype), **TOLERANCES[precision])
