"Shared by the tests of label errors and photographs: a network that can be computed by hand"
import torch
from torch import nn

FACTS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


class Colours(nn.Module):
    "Features: mean of each channel; logits: a linear map of them"
    def __init__(self, classes=24):
        super().__init__()
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(3, classes)
        with torch.no_grad():
            self.fc.weight.copy_(torch.linspace(-2, 2, 3 * classes).view(classes, 3).roll(5, 0))

    def forward(self, images): return self.fc(self.drop(images.mean((2, 3))))


class Small(nn.Module):
    "The network of the recorded cases: two convolutions, of which the second has a norm, pool, and a linear layer"
    def __init__(self, cases, case, residual=False, inplace=True):
        super().__init__()
        arrays = {name: cases[case, name] for name in ("conv1_weight", "conv2_weight", "fc_weight")}
        (first, _, *_), (second, _, *_), (classes, _) = (tuple(array.shape) for array in arrays.values())
        self.conv1, self.conv2 = nn.Conv2d(3, first, 3, padding=1), nn.Conv2d(first, second, 3, 2, 1)
        self.bn, self.relu, self.fc = nn.BatchNorm2d(second), nn.ReLU(inplace), nn.Linear(second, classes)
        if residual: self.down = nn.Conv2d(first, second, 1, 2)
        self.residual = residual
        weights = {name: cases[case, name.replace(".", "_")] for name in self.state_dict() if "num_b" not in name}
        self.load_state_dict(weights, strict=False)
        self.eval()

    def forward(self, images):
        maps = self.conv1(images).relu()
        out = self.bn(self.conv2(maps))
        if self.residual: out += self.down(maps)
        return self.fc(self.relu(out).mean((2, 3)))
