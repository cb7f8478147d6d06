"Whole training iterations of the released learned mixers, run by our passes on recorded weights, shares and partners"
import torch
from torch import nn
from torch.optim import SGD

from sumix_nb.mixers.automix import teacher_momentum
from sumix_nb.mixers.mixed import unmixed
from tests.oracles import near

NORMS = {"w": "weight", "b": "bias", "rm": "running_mean", "rv": "running_var"}


def tiny(cases, case):
    "The recorded network: two convolutions, with or without BatchNorm, and a linear layer"
    (c, d), classes = (len(cases[case, f"init_q_conv{i}_b"]) for i in (1, 2)), cases[case, "K"]
    norms = [[nn.BatchNorm2d(n)] if cases[case, "bn"] else [] for n in (c, d)]
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, c, 3, 2, 1), *norms[0], nn.ReLU()),
                         nn.Sequential(nn.Conv2d(c, d, 3, 2, 1), *norms[1], nn.ReLU()),
                         nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(d, classes))


def named(passes):
    "Our tensors by their recorded names: of student and teacher, their heads, and the generator"
    network, parts, found = passes.network, passes.parts, {}
    students = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for who, get in (("q", students.get), ("k", lambda name: getattr(parts.teacher, parts.teacher.own(name), None))):
        for layer in (1, 2):
            for short, name in NORMS.items():
                found[f"{who}_conv{layer}_{short}"] = get(f"{layer - 1}.0.{name}")
                found[f"{who}_bn{layer}_{short}"] = get(f"{layer - 1}.1.{name}")
        for short, name in (("w", "weight"), ("b", "bias")):
            found[f"h1{who}_{short}"] = get(f"3.{name}")
            found[f"hm{who}_{short}"] = (getattr(parts.head, name) if who == "q" else
                                         getattr(parts.teacher_head, parts.teacher_head.own(name)))
    for label, layer in zip("qkv", ("query", "key", "value")):
        for short, name in (("w", "weight"), ("b", "bias")):
            found[f"gen_{label}_{short}"] = getattr(getattr(parts.generator, layer, None), name, None)
    return {name: value for name, value in found.items() if value is not None}


def run_iterations(cases, case, passes, precision, dtype, draws, terms_of):
    "Two steps; every loss, mask, gradient and new weight of each is compared. How many numbers were"
    model = tiny(cases, case).to(dtype).train()
    passes.attach(model)
    tensors, compared = named(passes), 0
    with torch.no_grad():
        for name, value in tensors.items():
            if (case, f"init_{name}") in cases:
                value.copy_(torch.as_tensor(cases[case, f"init_{name}"]).to(dtype).reshape(value.shape))
    optimizer = SGD(model.parameters(), lr=cases[case, "lr"], momentum=cases[case, "sgd_momentum"],
                    weight_decay=cases[case, "weight_decay"])
    for step in (0, 1):
        images, target = cases[case, "x"][step].to(dtype), cases[case, "y"][step]
        iteration = int(cases[case, "iters"][step])
        setup = cases[case, "max_iters"], *(cases[case, f"{name}_momentum"] for name in ("base", "end"))
        momentum = teacher_momentum(iteration, *setup, tuple(cases[case, "adjust_scope"].tolist()))
        draws(step)
        optimizer.zero_grad()
        evidence = passes.collect(model, model(passes.inputs(unmixed(images, target), images)))
        found = terms_of(passes, evidence, step)
        found["loss"].backward()
        found |= {f"grad_{name}": value.grad for name, value in tensors.items() if value.grad is not None}
        optimizer.step()
        passes.parts.follow(model, momentum)
        found |= {"momentum": momentum, **{f"new_{name}": value for name, value in tensors.items()}}
        prefix = f"{case}__{precision}__s{step}_"
        wanted = {name.removeprefix(prefix): value for name, value in cases.arrays.items() if name.startswith(prefix)}
        for short, value in wanted.items():
            if short not in found:
                assert short.startswith("acc_") or short in ("feature", "mask_bb_raw"), f"nothing compared with {short}"
                continue
            value = torch.as_tensor(value, dtype=dtype)
            near(torch.as_tensor(found[short], dtype=dtype).detach().reshape(value.shape), value,
                 "f32 trained" if precision == "f32" else "f64")
            compared += 1
    return compared
