"""Each exercise's check: the right answer, wrong ones of many kinds, and their hints."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import elsewhere
import numpy as np
import pytest

import gpuml
from gpuml import exercises
from gpuml.devices import Device
from gpuml.exercises import AnswerError, bounds, check
from gpuml.exercises.judging import complaint, uses

FOLDER = Path(__file__).parent.parent / "notebooks" / "exercises"
SOURCES = sorted(FOLDER.glob("*.ipynb"))

SAME = "train.max(axis=0) == train.min(axis=0)"
# What somebody might write instead, as a change of the right answer, and words of the hint.
WRONG = {
    "there_and_back": [
        (
            "device.asarray(values)",
            "gpuml.get_device('cpu').asarray(values)",
            "nothing was brought",
        ),
        ("there**2 + 1", "there**2", "plus one"),
        ("there**2 + 1", "(there + 1)**2", "before squaring"),
        ("there**2 + 1", "device.asarray(values)**2 + 1", "called 2 times"),
        (
            "device.asarray(values)\n    return gpuml.to_host(there**2 + 1)",
            "device.asarray([v * v + 1 for v in values])\n    return gpuml.to_host(there)",
            "something else than `values`",
        ),
    ],
    "row_halves": [
        ("a[half:] @ b", "a[-half:] @ b", "A row is missing"),
        ("a[:half] @ b, a[half:] @ b", "a[half:] @ b, a[:half] @ b", "the wrong order"),
        (
            "half = len(a) // 2\n    return a[:half] @ b, a[half:] @ b",
            "half = b.shape[1] // 2\n    return a @ b[:, :half], a @ b[:, half:]",
            "the *columns* were split",
        ),
        ("a[:half] @ b, a[half:] @ b", "b[:half] @ a, b[half:] @ a", "the order of factors counts"),
        ("a[:half] @ b, a[half:] @ b", "a @ b", "expected a tuple of 2, got an array"),
        ("len(a) // 2", "-(-len(a) // 2)", "the rest belongs to the lower"),
    ],
    "relative_error": [
        (" / xp.linalg.norm(exact)", "", "*absolute* error"),
        ("/ xp.linalg.norm(exact)", "/ xp.linalg.norm(result)", "The exact one is the reference"),
        (
            "xp.linalg.norm(result - exact) / xp.linalg.norm(exact)",
            "((result - exact)**2).sum() / (exact**2).sum()",
            "not rooted",
        ),
        ("float(xp.linalg.norm(result - exact)", "abs(result - exact) / (1", "expected a number"),
    ],
    "seconds_of": [
        ("device.synchronize()\n    return", "return", "time to *queue* the work"),
        ("work()\n    device.synchronize()\n    start", "device.synchronize()\n    start", "first"),
        ("work()\n    device.synchronize()\n    start", "work()\n    start", "*before* you start"),
        ("clock() - start", "1000 * (clock() - start)", "in milliseconds"),
        ("work()", "pass", "never called"),
    ],
    "intensity": [
        ("2 * m", "m", "two operations"),
        ("itemsize *", "", "per *number*"),
        (" + m * n", "", "must be written, too"),
        ("n_operations / n_bytes", "n_bytes / n_operations", "bytes per operation"),
        ("2 * m * k * n", "m * n * (2 * k - 1)", "begins at 0"),
    ],
    "break_even": [
        ("launch_gpu - launch_cpu", "launch_cpu - launch_gpu", "sign is wrong"),
        ("1 / rate_cpu - 1 / rate_gpu", "1 / rate_cpu", "1 / rate_gpu is missing"),
        ("launch_gpu - launch_cpu", "launch_gpu", "not free"),
        ("/ (1 / rate_cpu - 1 / rate_gpu)", "* (rate_gpu - rate_cpu)", "not rates"),
        (
            "(launch_gpu - launch_cpu) / (1 / rate_cpu - 1 / rate_gpu)",
            "abs((launch_gpu - launch_cpu) / (1 / rate_cpu - 1 / rate_gpu))",
            "leave the sign",
        ),
        ("1 / rate_cpu - 1 / rate_gpu", "abs(1 / rate_cpu - 1 / rate_gpu)", "leave the sign"),
    ],
    "predicted_seconds": [
        ("max(memory, arithmetic)", "memory + arithmetic", "not their sum"),
        ("max(memory, arithmetic)", "min(memory, arithmetic)", "shorter of both"),
        ("launches * ", "", "multiply by their number"),
        (" + bus", "", "over the bus is missing"),
        ("to_device_pageable", "copy", "as fast as the memory"),
    ],
    "sectors": [
        (" * itemsize", "", "A sector has 32 *bytes*"),
        ("len({i * stride * itemsize // 32 for i in range(32)})", "32", "counts once"),
        ("range(32)", "range(33)", "from 0 to 31"),
        (
            "len({i * stride * itemsize // 32 for i in range(32)})",
            "max(1, stride * itemsize)",
            "No more sectors can be touched",
        ),
    ],
    "split_rows": [
        ("len(a) * i // n_parts", "len(a) // n_parts * i", "Rows are missing at the end"),
        ("edges[i + 1]]", "edges[i + 1] + 1]", "overlap"),
        ("] @ b", "]", "still to be multiplied"),
        ("range(n_parts)]", "reversed(range(n_parts))]", "reversed"),
        ("len(a) * i // n_parts", "len(a) * (i // n_parts)", "of [0, 0, 6] rows"),
    ],
    "times_transposed": [
        ("b.swapaxes(-1, -2)", "b.T", "reverses *all* axes"),
        ("a, b.swapaxes(-1, -2)", "a.swapaxes(-1, -2), b", "not `b`"),
        ("a, b.swapaxes(-1, -2)", "b, a.swapaxes(-1, -2)", "transposed of what is asked for"),
        (
            "gpuml.batched_matmul(a, b.swapaxes(-1, -2))",
            "gpuml.array_module(a).stack([x @ y.T for x, y in zip(a, b)])",
            "in one call",
        ),
    ],
    "batch_size": [
        ("(m * k + k * n + m * n)", "m * n", "the two factors need memory"),
        ("itemsize *", "", "a number has `itemsize` bytes"),
        ("share * free // each", "free // each", "not the share"),
        ("max(1, int(share * free // each))", "int(share * free // each)", "makes no progress"),
        ("int(share * free // each)", "1 + int(share * free // each)", "rounded up"),
        ("share * free // each", "share * (free // each)", "rounded down twice"),
    ],
    "tiled_product": [
        ("+= multiply", "= multiply", "*add* its product"),
        ("a.shape[0], tile", "a.shape[0] - tile + 1, tile", "The edge is missing"),
        ("a.shape[1], depth", "a.shape[1] - depth, depth", "last panel along K"),
        ("multiply(left, right)", "left @ right", "your function uses `@`"),
        ("multiply(left, right)", "xp.dot(left, right)", "your function uses `dot`"),
        ("multiply(left, right)", "multiply(a, b)", "does not fit into `multiply`"),
        ("a.dtype)", "float)", "got float64"),
    ],
    "bytes_in": [
        ("-(-n // tile_n)", "-(-m // tile_m)", "expected 805,306,368, got 671,088,640"),
        (
            "-(-n // tile_n)\n    rows_of_tiles = -(-m // tile_m)",
            "n // tile_n\n    rows_of_tiles = m // tile_m",
            "Round up",
        ),
        ("itemsize * (", "(", "each has `itemsize` bytes"),
        (
            "m * k * columns_of_tiles + k * n * rows_of_tiles",
            "m * k * rows_of_tiles + k * n * columns_of_tiles",
            "The tiles are swapped",
        ),
        ("* columns_of_tiles + k * n * rows_of_tiles", "+ k * n", "A and B once"),
        (
            "m * k * columns_of_tiles + k * n * rows_of_tiles",
            "k * (tile_m + tile_n) * columns_of_tiles * rows_of_tiles",
            "at the edge are smaller",
        ),
    ],
    "double_buffered": [
        ("done[-2]", "done[-1]", "one after the other"),
        ("done[-2])", "0.0)", "With *two* buffers"),
        ("return done[-1]", "return max(sum(copies), sum(products))", "bound from below"),
        ("return done[-1]", "return done[-2]", "expected"),
        ("done[-2])", "done[-3] if len(done) > 3 else 0.0)", "expected"),
        ("max(copied[-1], done[-1]) + product", "copied[-1] + product", "one before as well"),
    ],
    "gradient": [
        ("2 / Y.size", "2", "divide by the number of *all* its terms"),
        ("Y.size", "len(X)", "over the outputs as well"),
        ("2 / Y.size", "1 / Y.size", "The 2 from the derivative"),
        ("X @ W - Y", "Y - X @ W", "The sign is wrong"),
        ("X.T @", "X @", "X was not transposed"),
        ("X.T @ (X @ W - Y)", "(X @ W - Y).T @ X", "transposed of the gradient"),
    ],
    "descend": [
        ("W - learning_rate", "W + learning_rate", "went uphill"),
        ("range(n_steps)", "range(n_steps - 1)", "One step too few"),
        ("range(n_steps)", "range(n_steps + 1)", "One step too many"),
        ("W = W - learning_rate * gradient(W)", "W -= learning_rate * gradient(W)", "argument `W`"),
        ("    return W", "        return W", "return"),
    ],
    "largest_stable_rate": [
        ("float(2 /", "float(1 /", "down to -1"),
        ("2 / len(X) * ", "", "The Hessian is 2 / n"),
        ("[-1]", "[0]", "flattest direction"),
        ("2 / len(X) * ", "1 / len(X) * ", "a factor 2"),
        *(
            (
                "xp.linalg.eigvalsh(hessian)[-1]",
                f"np.linalg.eigvals(gpuml.to_host(hessian))[{place}]",
                "in any order",
            )
            for place in (0, -1)
        ),
    ],
    "momentum_step": [
        (
            "    V = momentum * V + gradient\n    return W - learning_rate * V, V",
            "    return W - learning_rate * V, momentum * V + gradient",
            "*old* velocity",
        ),
        ("+ gradient", "+ (1 - momentum) * gradient", "no factor 1 - β"),
        ("W - learning_rate", "W + learning_rate", "Against the gradient"),
        ("W - learning_rate * V, V", "V, W - learning_rate * V", "wrong order"),
        ("V = momentum * V + gradient", "V *= momentum; V += gradient", "changed its argument `V`"),
        ("W - learning_rate", "W - (1 - momentum)", "keeps the share β"),
        ("momentum * V", "(1 - learning_rate) * V", "keeps the share β"),
        ("momentum * V", "(1 - momentum) * V", "keeps the share β"),
        ("learning_rate * V,", "0.05 * V,", "are wrong"),
        ("momentum * V", "0.9 * V", "are wrong"),
    ],
    "standardise": [
        (
            "(held_out - mean) / spread",
            "(held_out - held_out.mean(axis=0)) / xp.where(held_out.std(axis=0) == 0, 1, "
            "held_out.std(axis=0))",
            "of their own",
        ),
        ("    mean,", "    both = xp.concatenate([train, held_out])\n    mean,", None),
        (f"    spread = xp.where({SAME}, 1, spread)\n", "", "0 / 0 is not a number"),
        (SAME, "spread == 0", "is 2e-16, not 0"),
        (
            f"    spread = xp.where({SAME}, 1, spread)\n"
            "    return (train - mean) / spread, (held_out - mean) / spread",
            "    return tuple(xp.nan_to_num((a - mean) / spread) for a in (train, held_out))",
            "x / 0 is infinite",
        ),
        (
            "(held_out - mean) / spread",
            f"xp.where({SAME}, 0, (held_out - mean) / spread)",
            "in `held_out` it may be another one",
        ),
        ("train.mean(axis=0), train.std(axis=0)", "train.mean(), train.std()", "`axis=0`"),
        ("train.std(axis=0)", "train.var(axis=0)", "variance"),
    ],
    "softmax": [
        ("z - z.max(axis=1, keepdims=True)", "z", "large logit is infinite"),
        ("axis=1, keepdims=True)\n", "axis=0)\n", "of a *row* must add up"),
        ("e.sum(axis=1, keepdims=True)", "e.sum()", "share one sum"),
        (" / e.sum(axis=1, keepdims=True)", "", "divide them by their sum"),
        ("z.max(axis=1, keepdims=True)", "z.max()", "largest logit of *all* rows"),
        *(
            ("z.max(axis=1, keepdims=True)", other, "large logit is infinite")
            for other in (
                "z.mean(axis=1, keepdims=True)",
                "z.min(axis=1, keepdims=True)",
                "xp.median(z, axis=1, keepdims=True)",
                "z[:, :1]",
            )
        ),
        ("z.max(axis=1, keepdims=True)", "abs(z).max(axis=1, keepdims=True)", "with its sign"),
        ("z - z.max(axis=1, keepdims=True)", "xp.clip(z, -500, 500)", "are wrong"),
    ],
    "cross_entropy": [
        ("p / len(z)", "p", "has a 1 / n as well"),
        ("-xp.log", "xp.log", "*negative* logarithm"),
        ("-= 1", "+= 1", "1 was added"),
        ("    p[rows, labels] -= 1\n", "", "These are the probabilities"),
        (
            "-xp.log(p[rows, labels]).mean()\n    p[rows, labels] -= 1",
            "-xp.log(p[rows, labels]).mean()\n    p = p - xp.eye(int(labels.max()) + 1)[labels]",
            "a row of the last class",
        ),
    ],
    "backward": [
        (" * (a > 0)", "", "ReLU is missing on the way back"),
        ("(d2 @ w2.T) * (a > 0)", "xp.maximum(d2 @ w2.T, 0)", "ReLU was applied to the gradient"),
        ("a.T @ d2", "(x @ w1 + b1).T @ d2", "*after* ReLU"),
        ("d2 @ w2.T", "d2 @ w2", "On the way back W2 is transposed"),
        (
            "d1.sum(axis=0), a.T @ d2, d2.sum(axis=0)",
            "d1.mean(axis=0), a.T @ d2, d2.mean(axis=0)",
            "*sum* over the rows",
        ),
    ],
    "bound_by": [
        ("max(seconds", "min(seconds", "*shortest* time"),
        ("n_launches * ceilings", "ceilings", "multiply by their number"),
        (
            "max(seconds, key=seconds.get)",
            "'arithmetic' if n_operations > n_bytes else 'memory'",
            "cannot be compared",
        ),
        ("return max(seconds, key=seconds.get)", "print(max(seconds, key=seconds.get))", "printed"),
    ],
    "fused_update": [
        (
            "weights -= rate * velocity",
            "weights = weights - rate * velocity",
            "weights are as they",
        ),
        ("velocity *= momentum", "velocity = velocity * momentum", "as it was"),
        (
            "    velocity *= momentum\n    velocity += gradient\n    weights -= rate * velocity",
            "    weights -= rate * velocity\n    velocity *= momentum\n    velocity += gradient",
            "*old* velocity",
        ),
        ("velocity *= momentum", "velocity *= 0", "The momentum is missing"),
        (
            "velocity += gradient",
            "gradient += velocity; velocity[...] = gradient",
            "changed its argument `gradient`",
        ),
        ("*= momentum", "*= 1 - momentum", "not the one that is lost"),
        ("+= gradient", "+= (1 - momentum) * gradient", "counts in full"),
        ("*= momentum", "*= momentum**2", "are wrong"),
        ("-= rate", "-= 2 * rate", "are wrong"),
        ("*= momentum", "*= 0.9", "are wrong"),
        ("-= rate", "-= 0.05", "are wrong"),
    ],
    "amdahl": [
        ("1 / (1 - share + share / factor)", "1 - share + share / factor", "its inverse"),
        ("share / factor)", "0)", "infinite factor"),
        ("1 / (1 - share + share / factor)", "1 - share + share * factor", "speeds do not"),
        ("1 - share + share / factor", "share + (1 - share) / factor", "swapped"),
    ],
    "rounded_product": [
        ("coarse(a) @ coarse(b)", "coarse(a @ b)", "Only the result was rounded"),
        ("coarse(a) @ coarse(b)", "coarse(coarse(a) @ coarse(b))", "stays in `float32`"),
        ("coarse(a) @ coarse(b)", "a @ b", "Nothing was rounded"),
        ("coarse(a) @", "a @", "Only the right factor"),
    ],
    "restarts_for": [
        ("math.log(1 - p)", "math.log(p)", "not of p"),
        ("math.ceil", "math.floor", "rounded down"),
        ("math.log(miss) / math.log(1 - p)", "math.log(1 - p) / math.log(miss)", "upside down"),
        ("math.log(miss) / math.log(1 - p)", "1 / p", "*one* hit"),
        ("math.ceil(", "1 + int(", "One run too many"),
        ("math.ceil(", "1 + math.floor(", "One run too many"),
    ],
    "layer_of_many": [
        ("b[:, None, :]", "b", "The bias lacks an axis"),
        (" + b[:, None, :]", "", "The bias is missing"),
        (" + b[:, None, :], 0)", ", 0) + b[:, None, :]", "after ReLU"),
        (
            "xp.maximum(gpuml.batched_matmul(x, W) + b[:, None, :], 0)",
            "gpuml.batched_matmul(x, W) + b[:, None, :]",
            "ReLU is missing",
        ),
        (
            "xp.maximum(gpuml.batched_matmul(x, W) + b[:, None, :], 0)",
            "xp.stack([xp.maximum(x @ w + c, 0) for w, c in zip(W, b)])",
            "uses a loop",
        ),
    ],
    "update_many": [
        ("rates[:, None, None]", "rates", "lack two axes"),
        ("rates[:, None, None]", "rates[:, None]", "`rates[:, None]` meets the inputs"),
        ("W - rates", "W + rates", "uphill"),
        (
            "W - rates[:, None, None] * gradients",
            "[w - r * g for w, r, g in zip(W, rates, gradients)]",
            "uses a loop",
        ),
    ],
    "survivors": [
        ("(math.isnan(losses[i]), losses[i])", "(math.isnan(losses[i]), -losses[i])", "worst"),
        (
            "(math.isnan(losses[i]), losses[i])",
            "(not math.isnan(losses[i]), losses[i])",
            "was kept",
        ),
        ("max(1, len(losses) // factor)", "len(losses) // factor", "one stays always"),
        (
            "return order[: max(1, len(losses) // factor)]",
            "return [losses[i] for i in order[: max(1, len(losses) // factor)]]",
            "These are losses",
        ),
        (
            "return order[: max(1, len(losses) // factor)]",
            "return sorted(order[: max(1, len(losses) // factor)])",
            "the best first",
        ),
        ("len(losses) // factor", "round(len(losses) / factor)", "rounded *down*"),
        ("len(losses) // factor", "math.ceil(len(losses) / factor)", "rounded *down*"),
        (
            "return order[",
            "return [i for i in order if losses[i] == losses[i]][",
            "here nobody was left",
        ),
        ("return order[", "return [losses.index(losses[i]) for i in order][", "finds the first"),
        (
            "    return order[: max(1, len(losses)",
            "    order = [i for i in order if losses[i] == losses[i]]\n"
            "    return order[: max(1, len(order)",
            "*all* models goes on",
        ),
    ],
    "shards": [
        ("n_rows * rank // world_size", "n_rows // world_size * rank", "belong to nobody"),
        ("edges[r + 1])", "edges[r + 1] + 1)", "belong to two ranks"),
        ("range(world_size)]", "range(world_size - 1)]", "expected"),
        (
            "n_rows * rank // world_size",
            "min(n_rows, -(-n_rows // world_size) * rank)",
            "Rounded up",
        ),
        ("n_rows * rank // world_size", "n_rows * rank / world_size", "`/` gives fractions"),
        ("edges[r + 1])", "edges[r + 1], 2)", "with steps"),
        ("edges[r + 1])", "edges[r + 1] if r + 1 < world_size else None)", "no whole numbers"),
    ],
    "weighted_gradient": [
        ("n / total * g", "g / len(rows)", "the plain mean"),
        ("n / total * g", "g", "That is the sum"),
        ("n / total * g", "n * g", "do not add up to 1"),
        ("sum(n / total", "(n / total", "expected an array"),
    ],
    "tree_all_reduce": [
        ("[a.copy() for a in arrays]", "arrays", "had just been changed"),
        ("distance *= 2", "break", "after one round"),
        ("distance < len(arrays)", "2 * distance < len(arrays)", "A round is missing"),
        ("a += messages[rank ^ distance]", "a = a + messages[rank ^ distance]", "Nothing has"),
    ],
    "ring_seconds": [
        (
            "n_steps * (latency + n_bytes / world_size / bandwidth)",
            "latency + n_steps * n_bytes / world_size / bandwidth",
            "paid for every message",
        ),
        ("2 * (world_size - 1)", "world_size - 1", "twice"),
        (" / world_size / bandwidth", " / bandwidth", "a p-th of the array"),
        ("2 * (world_size - 1)", "2 * world_size", "p - 1 steps, not p"),
    ],
    "fgsm_step": [
        ("xp.sign(gradient)", "gradient", "take the *sign*"),
        ("x + strength", "x - strength", "went downhill"),
        (
            "xp.clip(x + strength * xp.sign(gradient), low, high)",
            "x + strength * xp.sign(gradient)",
            "left the range",
        ),
        (
            "xp.clip(x + strength * xp.sign(gradient), low, high)",
            "x + xp.clip(strength * xp.sign(gradient), low, high)",
            "perturbation was clipped",
        ),
    ],
    "project_l2": [
        ("xp.maximum(lengths, radius)", "lengths", "stretched to its surface"),
        ("(delta**2).sum(axis=1, keepdims=True)", "(delta**2).sum()", "One length was taken"),
        (
            "delta * (radius / xp.maximum(lengths, radius))",
            "xp.clip(delta, -radius, radius)",
            "a cube, not a ball",
        ),
        ("axis=1, keepdims=True", "axis=0, keepdims=True", "Lengths of columns"),
        (
            "delta * (radius / xp.maximum(lengths, radius))",
            "delta * xp.where(lengths > radius, radius, lengths) / lengths",
            "length 0",
        ),
    ],
    "clipped_sum": [
        ("project_l2(gradients, max_norm).sum(axis=0)", "gradients.sum(axis=0)", "was clipped"),
        (
            "project_l2(gradients, max_norm).sum(axis=0)",
            "project_l2(gradients.sum(axis=0)[None], max_norm)[0]",
            "The *sum* was clipped",
        ),
        (".sum(axis=0)", ".mean(axis=0)", "That is the mean"),
        (".sum(axis=0)", "", "add them up"),
        (".sum(axis=0)", ".sum(axis=1)", "expected shape (4,), got (8,)"),
    ],
    "norms_without_gradients": [
        (
            "xp.sqrt((a**2).sum(axis=1) * (d**2).sum(axis=1))",
            "xp.sqrt(((a[:, :, None] * d[:, None, :]) ** 2).sum(axis=(1, 2)))",
            "too much memory",
        ),
        (
            "xp.sqrt((a**2).sum(axis=1) * (d**2).sum(axis=1))",
            "(a**2).sum(axis=1) * (d**2).sum(axis=1)",
            "the root is missing",
        ),
        ("(a**2).sum(axis=1) *", "((a**2).sum(axis=1) + 1) *", "the share of a bias"),
        (".sum(axis=1) * (", ".sum(axis=1) + (", "The two norms were added"),
        ("axis=1", "axis=0", "mixed up"),
    ],
    "gpu_speedup": [
        ('n_bytes / gpu["bus"] + n_calls', "n_calls", "have to get to the GPU first"),
        ('n_bytes / gpu["bus"] + n_calls', 'n_calls * n_bytes / gpu["bus"] + n_calls', "over the"),
        ("on_cpu / on_gpu", "on_gpu / on_cpu", "how many times as long"),
        ('rates["launch"] + work', "work", "Each call must be launched"),
        (
            'max(n_bytes / rates["memory"], n_operations / rates["arithmetic"])',
            'n_bytes / rates["memory"] + n_operations / rates["arithmetic"]',
            "the longer of both",
        ),
        ('n_bytes / gpu["bus"] + n_calls *', 'n_bytes / gpu["bus"] +', "makes all the calls"),
    ],
    "rows_that_fit": [
        ("3 * n_parameters", "n_parameters", "there three times"),
        (" - 3 * n_parameters", "", "before the first row"),
        ("(sizes[i] + 1)", "sizes[i]", "The biases are missing"),
        ("sizes[0] + 2 * sum(sizes[1:])", "sum(sizes)", "on the way back"),
        ("sizes[0] + 2 * sum(sizes[1:])", "2 * sum(sizes)", "The input has no gradient"),
        ("free // itemsize", "free", "Bytes were divided by numbers"),
        ("left // each", "left / each", "A row is whole"),
        ("max(0, left // each)", "left // each", "the answer is 0"),
    ],
    "agree": [
        (
            "bool(difference <= tolerance * xp.abs(reference).max())",
            "(result == reference).all()",
            "expected True or False",
        ),
        (
            "difference <= tolerance * xp.abs(reference).max()",
            "(result == reference).all()",
            "Bits were compared",
        ),
        (" * xp.abs(reference).max()", "", "*absolute* tolerance"),
        ("xp.abs(result - reference).max()", "(result - reference).max()", "two signs"),
        ("xp.abs(result - reference).max()", "xp.abs(result - reference).mean()", "disappears"),
        ("math.sqrt(n_terms)", "n_terms", "the root of `n_terms`"),
        (" * math.sqrt(n_terms)", "", "does not grow with `n_terms`"),
        ("np.finfo(reference.dtype)", "np.finfo(np.float32)", "much more finely"),
        (
            "difference <= tolerance * xp.abs(reference).max()",
            "(xp.abs(result - reference) <= tolerance * xp.abs(reference)).all()",
            "held against itself",
        ),
        (
            "bool(difference <= tolerance * xp.abs(reference).max())",
            "not bool((xp.abs(result - reference) > tolerance * xp.abs(reference).max()).any())",
            "comparison with NaN",
        ),
        (
            "difference <= tolerance * xp.abs(reference).max()",
            "xp.allclose(result, reference)",
            "knows neither",
        ),
        ("np.finfo(reference.dtype)", "np.finfo(result.dtype)", "may have another type"),
        ("xp.abs(reference).max()", "xp.abs(result).max()", "may be of any size"),
        ("* xp.abs(reference).max()", "* reference.max()", "may be a negative one"),
        ("* xp.abs(reference).max()", "* xp.abs(reference.max())", "expected"),
        ("= 4 *", "= 8 *", "The factor is 4"),
        ("= 4 *", "= 1 *", "The factor is 4"),
    ],
}
# What is right as well.
RIGHT = {
    "there_and_back": [
        ("device.asarray(values)", "device.asarray(np.array(values))"),
        ("device.asarray(values)", "device.asarray(tuple(values))"),
    ],
    "row_halves": [("a[:half] @ b, a[half:] @ b", "(a @ b)[:half], (a @ b)[half:]")],
    "seconds_of": [
        (
            "    work()\n    device.synchronize()\n    return clock() - start",
            f"    for _ in range({n}):\n        work()\n    device.synchronize()\n"
            f"    return (clock() - start) / {n}",
        )
        for n in (10, 1000)
    ],
    "sectors": [
        (
            "len({i * stride * itemsize // 32 for i in range(32)})",
            "min(32, max(1, stride * itemsize))",
        )
    ],
    "tiled_product": [("a.dtype)", "b.dtype)")],
    "largest_stable_rate": [
        ("xp.linalg.eigvalsh(hessian)[-1]", "xp.linalg.eigvalsh(hessian).max()"),
        ("xp.linalg.eigvalsh(hessian)[-1]", "xp.linalg.svd(hessian)[1][0]"),
    ],
    "momentum_step": [("return W - learning_rate * V, V", "return [W - learning_rate * V, V]")],
    "standardise": [
        (SAME, "spread <= 1e-12"),
        (SAME, "(train == train[0]).all(axis=0)"),
        (
            "xp.where(train.max(axis=0) == train.min(axis=0), 1, spread)",
            "spread + (spread < 1e-12)",
        ),
    ],
    "softmax": [("z - z.max(axis=1, keepdims=True)", "(z.T - z.max(axis=1)).T")],
    "cross_entropy": [
        (
            "    p[rows, labels] -= 1\n    return float(loss), p / len(z)",
            "    return float(loss), (p - xp.eye(z.shape[1])[labels]) / len(z)",
        )
    ],
    "fused_update": [
        (
            "    velocity *= momentum\n    velocity += gradient\n    weights -= rate * velocity",
            "    velocity[...] = momentum * velocity + gradient\n"
            "    weights[:] = weights - rate * velocity",
        )
    ],
    "restarts_for": [
        (
            "return math.ceil(math.log(miss) / math.log(1 - p))",
            "n = 1\n    while (1 - p) ** n > miss:\n        n += 1\n    return n",
        ),
        ("math.ceil(math.log(miss) / math.log(1 - p))", "math.ceil(math.log(miss, 1 - p))"),
    ],
    "survivors": [
        ("(math.isnan(losses[i]), losses[i])", "(math.isnan(losses[i]), losses[i], -i)"),
        (
            "(math.isnan(losses[i]), losses[i])",
            "math.inf if math.isnan(losses[i]) else losses[i]",
        ),
    ],
    "batch_size": [("int(share * free // each)", "int(share * free / each)")],
    "break_even": [
        (
            "(launch_gpu - launch_cpu) / (1 / rate_cpu - 1 / rate_gpu)",
            "(launch_gpu - launch_cpu) * rate_cpu * rate_gpu / (rate_gpu - rate_cpu)",
        )
    ],
    "shards": [
        ("slice(edges[r], edges[r + 1])", "slice(edges[r] or None, edges[r + 1], 1)"),
        ("n_rows * rank // world_size", "int(np.linspace(0, n_rows, world_size + 1)[rank])"),
        (
            "edges = [n_rows * rank // world_size for rank",
            "edges = [rank * (n_rows // world_size) + min(rank, n_rows % world_size) for rank",
        ),
    ],
    "agree": [
        (
            "bool(difference <= tolerance * xp.abs(reference).max())",
            "bool((xp.abs(result - reference) <= tolerance * xp.abs(reference).max()).all())",
        )
    ],
}
KERNELS = {
    "saxpy": [
        ("    if i < y.size:\n        y[i]", "    y[i]", "Guard"),
        ("y[i] += alpha * x[i]", "y[i] = alpha * x[i]", "to be *added*"),
        ("y[i] += alpha * x[i]", "y[i] = alpha * y[i] + x[i]", "`alpha` multiplies `x`"),
        ("cuda.grid(1)", "cuda.threadIdx.x", "counts within a block"),
        ("i < y.size", "i < y.size - 1", "The last element is missing"),
        ("i < y.size", "i < min(8, y.size)", "Only the elements of the first block"),
        ("i < y.size", "i < 0", "Nothing was written"),
        ("@cuda.jit\n", "", "put @cuda.jit"),
        ("i < y.size", "i < 20", "Guard"),
        ("y[i] += alpha * x[i]", "x[i] *= alpha; y[i] += x[i]", "changed its argument `x`"),
        ("i < y.size", "i < min(16, y.size)", "which element does each"),
    ],
    "transpose": [
        ("column, row =", "row, column =", "gives the column first"),
        ("    if row < A.shape[0] and column < A.shape[1]:\n        B", "    B", "Guard"),
        (
            "A.shape[0] and column < A.shape[1]",
            "A.shape[0]-1 and column < A.shape[1]-1",
            "The last row and column",
        ),
        ("row < A.shape[0]", "row < 0", "Nothing was written"),
        ("B[column, row] = A[row, column]", "B[column, row] = -A[row, column]", "which element"),
    ],
    "count_positive": [
        ("cuda.atomic.add(total, 0, 1)", "total[0] += 1", "does not use `atomic`"),
        ("x[i] > 0", "x[i] >= 0", "Zeros were counted"),
        ("x[i] > 0", "x[i] > -99", "Every element was counted"),
        ("0, 1)", "0, int(x[i]))", "added up"),
        ("i < x.size", "i < 0", "Nothing was written"),
        (
            "    i = cuda.grid(1)\n",
            "    i = cuda.grid(1)\n    if i == 0:\n        total[0] = 0\n    cuda.syncthreads()\n",
            "numbers are wrong",
        ),
    ],
}


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def nbgrader(cell: dict) -> dict:
    return cell["metadata"].get("nbgrader", {})


def answers() -> dict[str, str]:
    """The teacher's answers, by the names of the exercises."""
    every = [cell for path in SOURCES for cell in cells(path) if nbgrader(cell).get("solution")]
    return {nbgrader(cell)["grade_id"]: "".join(cell["source"]) for cell in every}


ANSWERS = answers()
FUNCTIONS = [name for name in exercises.names() if name not in KERNELS]


def functions(name: str, source: str) -> dict:
    """All answers as functions, one of them as given."""
    import math

    made = {"gpuml": gpuml, "math": math, "np": np}
    for other in ("softmax", "project_l2"):  # answers that others use
        exec(ANSWERS[other], made)
    # as if it were a cell of a notebook: its lines can be shown
    exec(compile(source, f"<{name}>", "exec"), made)
    return made


def answer(name: str, old: str = "", new: str = ""):
    assert old in ANSWERS[name], f"{name}: the answer has no {old!r}"
    return functions(name, ANSWERS[name].replace(old, new))[name]


def message(name: str, function, **options) -> str:
    with pytest.raises(AnswerError) as caught:
        check(name, function, **options)
    text = str(caught.value)
    assert text.startswith(f"{name}: ")
    return text


@pytest.fixture
def device_elsewhere(monkeypatch):
    """A GPU that is none, whose arrays do not mix with NumPy's."""
    with suppress(gpuml.DeviceError):
        gpuml.get_device("gpu")
        pytest.skip("a GPU answers: it does the same, and better")
    monkeypatch.setitem(sys.modules, "cupy", elsewhere.library())
    # its kernels are for a real one
    monkeypatch.setattr(gpuml, "batched_matmul", lambda a, b: a @ b, raising=False)
    return Device("gpu")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_right_answer_is_right_where_arrays_do_not_mix(device_elsewhere, name):
    check(name, answer(name), device=device_elsewhere)


def test_arrays_of_the_wrong_place_are_refused(device_elsewhere):
    right = answer("gradient")
    host = message(
        "gradient", lambda X, Y, W: gpuml.to_host(right(X, Y, W)), device=device_elsewhere
    )
    assert "the result is in the host's memory, and the arguments are on the GPU" in host
    there = message("there_and_back", lambda v, d: d.asarray(v) ** 2 + 1, device=device_elsewhere)
    assert "the result is still on the GPU: `gpuml.to_host` brings it back" in there

    def mixed(X, Y, W):
        return X.T @ np.ones((20, 2))

    assert "it raised TypeError" in message("gradient", mixed, device=device_elsewhere)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_right_answer_is_right(device, name, capsys):
    assert check(name, answer(name), device=device) is None
    assert capsys.readouterr().out == f"{name}: right.\n"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "old", "new"), [(name, *other) for name in RIGHT for other in RIGHT[name]]
)
def test_other_right_answers_are_right(device, name, old, new):
    check(name, answer(name, old, new), device=device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "old", "new", "hint"),
    [(name, *wrong) for name, all_wrong in WRONG.items() for wrong in all_wrong if wrong[2]],
)
def test_wrong_answers_get_their_hints(device, name, old, new, hint):
    assert hint in message(name, answer(name, old, new), device=device)


def test_each_exercise_has_wrong_answers():
    assert set(WRONG) | set(KERNELS) == set(exercises.names())
    for name, wrong in (WRONG | KERNELS).items():
        assert len(wrong) >= 3, name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_known_mistake_gets_its_own_hint(name):
    known = exercises.exercise(name)
    assert len(known.mistakes) >= 3
    wrong = [(hint, wrong) for hint in known.mistakes for wrong in known.wrong_answers(hint)]
    for hint, mistake in wrong:
        with np.errstate(all="ignore"):
            found, _ = complaint(
                known, mistake, gpuml.get_device("cpu"), time_limit=20, memory_limit=2**30
            )
        assert found is not None, f"accepted: {hint}"
        assert found.endswith(hint) or "uses a loop" in found, found


KERNEL_PROGRAM = """
import json, sys
import gpuml
from gpuml import kernels
from gpuml.exercises import AnswerError, check
device = gpuml.get_device()
cuda = kernels.numba_cuda(device)
for name, source in json.load(sys.stdin):
    made = {"cuda": cuda}
    exec(source, made)
    try:
        check(name, made[name], time_limit=20)
    except AnswerError as error:
        print(str(error).replace("\\n", " "))
"""


def test_kernels(device):
    """In a process of its own, since Numba simulates all kernels of a process or none."""
    pytest.importorskip("numba")
    wrong = [(name, "", "", "right.") for name in KERNELS]
    wrong += [(name, *mistake) for name, mistakes in KERNELS.items() for mistake in mistakes]
    solution = ANSWERS["saxpy"].partition("    ###")[2]
    wrong.append(("saxpy", solution, "\n    raise NotImplementedError()", "there is no answer yet"))
    sources = []
    for name, old, new, _ in wrong:
        assert old in ANSWERS[name]
        sources.append((name, ANSWERS[name].replace(old, new)))
    done = subprocess.run(
        [sys.executable, "-c", KERNEL_PROGRAM],
        env=os.environ | {"GPUML_DEVICE": device.kind},
        input=json.dumps(sources),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(wrong)
    for (name, *_, hint), line in zip(wrong, said, strict=True):
        assert line.startswith(f"{name}: ")
        assert hint in line


ENDLESS_KERNEL = """
import threading
import gpuml
from gpuml import kernels
from gpuml.exercises import AnswerError, check
cuda = kernels.numba_cuda(gpuml.get_device("cpu"))

@cuda.jit
def saxpy(alpha, x, y):
    while True:
        pass

@cuda.jit
def transpose(A, B):
    while True:
        pass

for name, kernel in 2 * [("saxpy", saxpy), ("transpose", transpose)]:
    try:
        check(name, kernel, time_limit=0.3, device="cpu")
    except AnswerError as error:
        print("had not ended in time" in str(error), threading.active_count())
"""


def test_an_endless_kernel_in_the_simulator_ends_quietly():
    pytest.importorskip("numba")
    call = [sys.executable, "-c", ENDLESS_KERNEL]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert done.stdout == 4 * "True 1\n"
    assert done.stderr == ""


# --- answers that are worse than wrong ---------------------------------------------------------


def test_who_loops_forever_is_stopped(device):
    def amdahl(share, factor):
        while share:
            pass

    others, start = set(threading.enumerate()), time.perf_counter()
    text = message("amdahl", amdahl, device=device, time_limit=0.3)
    assert time.perf_counter() - start < 2
    assert "was stopped" in text
    assert "The limits are 0.3 s and 1 GiB." in text
    assert set(threading.enumerate()) <= others


@pytest.mark.parametrize(
    ("body", "handler"),
    [
        ("while share: pass", "except Exception: continue"),
        ("while share: pass", "except: continue"),
        ("n = int('no number')", "except: print('again')"),
        ("for i in range(10**6): factor += i", "except BaseException as error: n = str(error)"),
    ],
)
def test_who_catches_every_exception_is_stopped_too(body, handler, capsys):
    source = f"def amdahl(share, factor):\n while True:\n  try:\n   {body}\n  {handler}"
    others = set(threading.enumerate())
    text = message("amdahl", functions("amdahl", source)["amdahl"], time_limit=0.1)
    assert "was stopped" in text
    assert "restart the kernel" not in text
    assert set(threading.enumerate()) <= others


def test_a_stop_in_a_destructor_is_not_reported(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    monkeypatch.setattr(threading, "excepthook", reported.append)

    class Slow:
        def __del__(self):
            for _ in range(10**5):
                pass

    class Bad:
        def __del__(self):
            raise ZeroDivisionError

    def amdahl(share, factor):
        Bad()
        while True:
            Slow()

    assert "was stopped" in message("amdahl", amdahl, time_limit=0.1)
    assert [each.exc_type for each in reported] == [ZeroDivisionError]


@pytest.fixture
def stuck(monkeypatch):
    """An answer that nobody can stop, until the test is over."""
    monkeypatch.setattr(bounds, "GRACE", 0.1)
    go, threads = threading.Event(), []

    def amdahl(share, factor):
        threads.append(threading.current_thread())
        go.wait()

    def end():
        go.set()
        for thread in threads:
            thread.join()

    yield SimpleNamespace(amdahl=amdahl, end=end)
    end()


STOPPED_THEN_TRACED = """
import sys
import threading
import gpuml
from gpuml.exercises import bounds

bounds.GRACE = 1
go = threading.Event()

def loops():
    while True:
        pass

def catches():
    while True:
        try:
            loops()
        except:
            pass

def waits():
    go.wait()

def traced():
    sys.settrace(lambda *_: None)
    (lambda: 1)()
    sys.settrace(None)

for answer in (loops, catches, waits):
    device = gpuml.get_device("cpu")
    run = bounds.run_bounded(answer, device=device, time_limit=0.1, memory_limit=2**28)
    assert run.verdict == "too long"
    traced()
assert not run.ended
others = [thread for thread in threading.enumerate() if thread.name == "answer"]
go.set()
for thread in others:
    thread.join()
traced()
print("done")
"""


def test_python_looks_for_no_stops_afterwards():
    """In Python 3.11 a traced call, in a debugger say, does not end while it still does."""
    call = [sys.executable, "-c", STOPPED_THEN_TRACED]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr


AT_THE_END = """
import threading
import numpy as np
from gpuml.exercises import AnswerError, bounds, check

bounds.GRACE = 0.1
bounds.AT_EXIT = {seconds}

def gradient(X, Y, W):
    {body}

try:
    check("gradient", gradient, time_limit=0.2, device="cpu")
except AnswerError as error:
    assert "goes on in the background" in str(error)
    print("said", flush=True)
    {then}
"""
PRODUCT = "a = np.ones((6000, 6000), 'f4'); a @ a"


@pytest.mark.parametrize(
    ("seconds", "then", "code"), [(30, "pass", 0), (0.1, "pass", 0), (0.1, "raise", 1)]
)
def test_the_process_ends_although_a_product_goes_on(seconds, then, code):
    """BLAS would wait for it without end."""
    program = AT_THE_END.format(seconds=seconds, body=PRODUCT, then=then)
    call = [sys.executable, "-c", program]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "said\n"), done.stderr


def test_the_check_goes_on_without_a_call_that_nobody_can_stop(stuck):
    start = time.perf_counter()
    text = message("amdahl", stuck.amdahl, time_limit=0.1)
    assert time.perf_counter() - start < 2
    assert "It cannot be stopped and goes on in the background: restart the kernel." in text
    check("amdahl", answer("amdahl"))  # the next one is not disturbed


@pytest.mark.skipif(not bounds.LINUX, reason="only Linux keeps the limit")
@pytest.mark.parametrize("ends", ["before the next one", "during the next one", "afterwards"])
def test_who_goes_on_in_the_background_keeps_its_limits_and_no_longer(stuck, ends):
    import resource

    def limit():
        return resource.getrlimit(resource.RLIMIT_DATA)

    usual = limit()
    message("amdahl", stuck.amdahl, time_limit=0.1)
    assert limit() != usual

    def amdahl(share, factor):
        if ends == "during the next one":
            stuck.end()
        assert limit() != usual
        return 1 / (1 - share + share / factor)

    if ends == "before the next one":
        stuck.end()
        assert limit() == usual
    check("amdahl", amdahl)
    assert (limit() == usual) == (ends != "afterwards")
    stuck.end()
    assert limit() == usual


def memory_of(make):
    gc.collect()
    before = bounds.memory_in_use()
    make()
    gc.collect()
    return bounds.memory_in_use() - before


@pytest.mark.parametrize("kind", ["many arrays", "one array", "numbers", "with gaps", "text"])
def test_who_eats_memory_is_stopped_and_gives_it_back(device, kind):
    def amdahl(share, factor):
        kept = []
        while kind == "many arrays":
            kept.append(np.ones(10**6))
        while kind == "numbers":
            kept.append([0] * 100_000)
        while kind == "with gaps":
            kept.append([0] * 50_000)
            in_use.append([0] * 500)
        if kind == "text":
            return "x" * 2**40
        return np.ones(2**40)

    if kind in ("one array", "text") and not bounds.LINUX:
        pytest.skip("only Linux refuses an array when it is asked for")
    in_use = []  # small ones, between the large ones
    # From now on the C library takes what is smaller than this out of its own large blocks, as it
    # does in every process that has run for a while.
    np.empty(30 * 2**20, np.uint8)
    start = time.perf_counter()
    said = []
    more = memory_of(
        lambda: said.append(message("amdahl", amdahl, device=device, memory_limit="256 MiB"))
    )
    assert time.perf_counter() - start < 5
    assert more < 2**27
    [text] = said
    assert "it took too much memory and was stopped" in text
    assert "256 MiB" in text


@pytest.mark.skipif(not bounds.LINUX, reason="only Linux refuses an array when it is asked for")
def test_an_array_is_refused_before_anything_is_in_it(device):
    def gradient(X, Y, W):
        return np.empty(2**27)  # not a page of it is in memory yet

    assert "too much memory" in message("gradient", gradient, device=device, memory_limit="256 MiB")


def test_an_array_on_the_device_is_too_large(device):
    def gradient(X, Y, W):
        return gpuml.array_module(X).ones((2**15, 2**15)) + X[0, 0]

    text = message("gradient", gradient, device=device, memory_limit="1 GiB")
    assert "too much memory" in text
    check("gradient", answer("gradient"), device=device)


@pytest.mark.skipif(not bounds.LINUX, reason="only Linux keeps the limit")
def test_the_limits_of_the_process_are_restored():
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    check("amdahl", answer("amdahl"))
    message("amdahl", lambda share, factor: "x" * 2**40)
    message("amdahl", lambda share, factor: 1 / 0)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_the_limit_of_the_pool_is_restored(device_elsewhere, stuck):
    pool = device_elsewhere.xp.get_default_memory_pool()
    pool.set_limit(size=2**33)
    seen = []

    def amdahl(share, factor):
        seen.append(pool.get_limit())
        return 1 / (1 - share + share / factor)

    check("amdahl", amdahl, device=device_elsewhere, memory_limit="1 GiB")
    assert set(seen) == {2**30}
    assert pool.get_limit() == 2**33
    message("amdahl", stuck.amdahl, device=device_elsewhere, time_limit=0.1)
    assert pool.get_limit() == 2**30
    check("amdahl", amdahl, device=device_elsewhere, memory_limit="16 GiB")
    assert max(seen) == 2**33, "no more than was allowed before"
    stuck.end()
    assert pool.get_limit() == 2**33


def test_who_interrupts_the_check_stops_the_answer(monkeypatch):
    looks = itertools.count()

    def interrupted():
        if next(looks) == 3:
            raise KeyboardInterrupt
        return 0

    def amdahl(share, factor):
        while True:
            pass

    monkeypatch.setattr(bounds, "memory_in_use", interrupted)
    others = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        check("amdahl", amdahl)
    assert set(threading.enumerate()) <= others


def test_who_prints_instead_of_returning_is_told_so(device, capsys):
    def gradient(X, Y, W):
        print("the gradient:", (2 / Y.size * X.T @ (X @ W - Y)).shape)

    text = message("gradient", gradient, device=device)
    assert "it printed the gradient: (3, 2) and returned nothing" in text
    assert "the gradient: (3, 2)" in capsys.readouterr().out
    assert "Does it end with `return`" in message("gradient", lambda X, Y, W: None)


def test_what_a_right_answer_prints_is_shown(capsys):
    def amdahl(share, factor):
        print("share", share)
        return 1 / (1 - share + share / factor)

    check("amdahl", amdahl)
    out = capsys.readouterr().out
    assert out.startswith("share 0.5\nshare 0.9\n")
    assert out.endswith("amdahl: right.\n")


def test_who_prints_without_end_does_not_fill_the_notebook(capsys):
    def amdahl(share, factor):
        while True:
            print("again")

    message("amdahl", amdahl, time_limit=0.3)
    assert len(capsys.readouterr().out) <= bounds.MOST_PRINTED + 1


def test_who_writes_errors_without_end_does_not_fill_the_notebook(capsys):
    def amdahl(share, factor):
        while True:
            print("again", file=sys.stderr)

    message("amdahl", amdahl, time_limit=0.3)
    assert 0 < len(capsys.readouterr().err) <= bounds.MOST_PRINTED


def test_who_changes_an_argument_is_told_which(device):
    def project(delta, radius):
        delta[delta > radius] = radius
        return delta

    text = message("project_l2", project, device=device)
    assert "changed its argument `delta`" in text
    assert "delta = delta.copy()" in text

    def all_reduce(gradients, rows):
        for g, n in zip(gradients, rows, strict=True):
            g *= n / sum(rows)
        return sum(gradients)

    text = message("weighted_gradient", all_reduce, device=device)
    assert "argument `gradients`" in text
    assert "begin with `gradients = [g.copy() for g in gradients]`" in text


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("text", "expected an array of shape (3, 2), got str: 'text'"),
        ([1, 2], "got list: [1, 2]"),
        (3.5, "got float: 3.5"),
        (len, "got a function, len"),
        (np.int64, "got a function"),
    ],
)
def test_results_of_a_wrong_type(result, said):
    assert said in message("gradient", lambda X, Y, W: result)


@pytest.mark.parametrize("body", ["arrays[i] = sums[i]", "arrays[:] = sums"])
def test_who_puts_new_arrays_into_a_list_has_not_changed_the_old_ones(device, body):
    source = f"""def f(arrays):
        sums = [0 * arrays[0] for _ in arrays]
        for i in range(len(arrays)):
            for a in arrays:
                sums[i] = sums[i] + a
        for i in range(len(arrays)):
            {body}
"""
    text = message("tree_all_reduce", functions("f", source)["f"], device=device)
    assert "Hint: Nothing has changed. Write into the arrays" in text


def test_a_sum_without_rounds_is_refused():
    def f(arrays):
        arrays[0][...] = sum(arrays)

    assert "your function uses `sum`, but the sum is to come" in message("tree_all_reduce", f)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("survivors", "losses.sort()"),
        ("survivors", "losses[:] = [math.inf if x != x else x for x in losses]"),
        ("predicted_seconds", 'ceilings["launch"] = 0'),
        ("predicted_seconds", 'ceilings["more"] = 0'),
        ("weighted_gradient", "rows[0] = 1"),
        ("weighted_gradient", "gradients[:] = [2 * g for g in gradients]"),
    ],
)
def test_who_changes_a_number_of_the_callers_is_told_so(name, change):
    head, body = ANSWERS[name].split("    ### BEGIN SOLUTION\n")
    wrong = f"{head}    {change}\n{body}"
    text = message(name, functions(name, wrong)[name])
    changed = re.match(r"\w+", change)[0]
    assert f"it changed its argument `{changed}`" in text
    assert "Hint" not in text


def test_after_a_changed_argument_there_is_no_false_hint(device):
    wrong = answer("fgsm_step", "    return", "    x += strength * xp.sign(gradient)\n    return")
    text = message("fgsm_step", wrong, device=device)
    assert "it changed its argument `x`" in text
    assert "Hint" not in text


class NoLength(list):
    def __len__(self):
        raise RuntimeError("no length")


class NoTextError(Exception):
    def __str__(self):
        raise RuntimeError


class NoAttributes:
    def __getattr__(self, name):
        raise RuntimeError("no attributes")


def test_what_raises_when_it_is_looked_at_is_said_in_a_sentence():
    said = "the result cannot be compared: RuntimeError: no length."
    assert said in message("split_rows", lambda a, b, n_parts: NoLength())
    pair = slice(np.ones(2), np.ones(2))
    assert "edges that are no whole numbers" in message("shards", lambda n, p: [pair] * p)
    assert "no attributes" in message("amdahl", NoAttributes())
    assert "expected a number, got NoAttributes" in message("amdahl", lambda s, f: NoAttributes())

    def raises(share, factor):
        raise NoTextError

    assert "it raised NoTextError, in `raise NoTextError`." in message("amdahl", raises)

    def closes(share, factor):
        sys.stdout.close()
        return 1 / (1 - share + share / factor)

    check("amdahl", closes)


def test_a_text_of_numpys_is_a_text():
    right = answer("bound_by")
    check("bound_by", lambda n, b, o, c: np.str_(right(n, b, o, c)))
    assert "expected 'launches', got 'x'" in message("bound_by", lambda *_: np.str_("x"))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: check(len, "amdahl"), "TypeError: expected the name of an exercise, in quotes"),
        (lambda: check(None, len), "got NoneType for the name"),
        (lambda: check(["x"], len), "got list for the name"),
        (lambda: check("amdahl", len, device=3), "TypeError: expected a device or its name"),
        (lambda: check("amdahl", len, device="cup"), "ValueError: unknown device 'cup'"),
        (lambda: check("amdal", len), "ValueError: unknown exercise 'amdal': did you mean"),
        (lambda: check("amdahl", len, time_limit="5"), "seconds above 0 for time_limit; got '5'"),
        (lambda: check("amdahl", len, time_limit=None), "got None"),
        (lambda: check("amdahl", len, time_limit=np.nan), "got nan"),
        (lambda: check("amdahl", len, memory_limit=None), "no size of memory"),
    ],
)
def test_who_calls_the_check_wrongly_sees_one_sentence(call, said):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    [shown] = caught.value._render_traceback_()
    assert said in shown
    assert len(shown) < 600


@pytest.mark.parametrize("wrong", ["float('abc')", "X @ W.T"])
def test_another_error_of_the_same_class_gets_no_hint_of_a_known_one(wrong):
    text = message("gradient", functions("f", f"def f(X, Y, W): return {wrong}")["f"])
    assert "it raised ValueError" in text
    assert "X was not transposed" not in text
    assert "X was not transposed" in message("gradient", lambda X, Y, W: X @ (X @ W - Y))


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ("return unknown(share)", "run the cell that defines this name"),
        ("n += 1", "give it a value first"),
        ("return amdahl(share, factor)", "does your function call itself"),
    ],
)
def test_hints_for_errors_of_pythons(body, hint):
    wrong = functions("amdahl", f"def amdahl(share, factor):\n    {body}")["amdahl"]
    assert hint in message("amdahl", wrong).partition("\nHint: ")[2]


def test_who_asks_for_input_or_swaps_the_parameters_is_told_so():
    assert "do not ask for `input`" in message("amdahl", lambda share, factor: float(input()))
    text = message("amdahl", lambda factor, share: 1 / (1 - share + share / factor))
    assert "expected parameters (share, factor), got (factor, share). The order counts" in text


@pytest.mark.parametrize("name", ["gradient", "split_rows", "relative_error"])
def test_a_mask_hides_no_error(name):
    right = answer(name)

    def masked(*arguments):
        result = right(*arguments)
        if isinstance(result, list):
            return [np.ma.array(part, mask=True) for part in result]
        return np.ma.array(result, mask=True)

    assert "masked array, which hides numbers" in message(name, masked)


def test_parts_may_come_as_a_tuple():
    check(
        "shards", lambda n, p: tuple(slice(-(-n * r // p), -(-n * (r + 1) // p)) for r in range(p))
    )
    check("split_rows", lambda a, b, n: tuple(np.array_split(a @ b, n)))


def test_true_and_false_are_no_numbers():
    right = answer("agree")
    text = message("agree", lambda *arguments: not right(*arguments), device="cpu")
    assert re.search("expected (True, got False|False, got True)", text)
    assert "expected a number, got bool: True" in message("amdahl", lambda s, f: True)
    assert "expected a number, got bool: True" in message("amdahl", lambda s, f: np.bool_(True))
    assert "got complex128: (1+2j)" in message("amdahl", lambda s, f: np.complex128(1 + 2j))
    assert "got float64: 3.5" in message("gradient", lambda X, Y, W: np.float64(3.5))


def test_what_is_nearly_right_is_told_apart(device):
    right = answer("gradient")
    text = message("gradient", lambda X, Y, W: right(X, Y, W) * (1 + 1e-8), device=device)
    assert "times what they should be" not in text
    first, second = re.search(r"should be (\S+) and is (\S+)\.\n", text).groups()
    assert first != second
    assert "Hint: nearly right: was a small number added" in text
    text = message("amdahl", lambda s, f: 1 / (1 - s + s / f) + 1e-5)
    assert "expected 1.81818, got 1.81819." in text


class Odd:
    def __repr__(self):
        raise RuntimeError

    def __eq__(self, other):
        raise RuntimeError

    __hash__ = None


def odd_results():
    """What no exercise asks for."""
    endless: list = []
    endless.append(endless)
    numbers = [None, True, 0, -1, 1j, 0.5, np.nan, np.inf, 10**400, np.float32(3), np.bool_(True)]
    texts = ["", "text", b"text", "x" * 10**7]
    groups = [[], (), {}, set(), [None], (1, 2), [[1], [2, 3]], endless, range(3), slice(None)]
    groups += [[slice(0, 10**15)] * 3, [slice(None)] * 4, slice(0, 3), [0] * 10**6]
    arrays = [np.array([]), np.array(3), np.array("x"), np.array([None]), np.zeros(3, complex)]
    arrays += [np.ma.array([1.0]), np.zeros((3, 2), "M8[s]"), np.zeros((3, 2), object)]
    arrays += [[np.zeros((2, 2))] * 4, [np.zeros(3)] * 2, np.zeros((3, 2), "f4,i4")]
    others = [object(), Odd(), len, int, (i for i in range(3)), iter([]), Exception("x")]
    return [*numbers, *texts, *groups, *arrays, *others]


# one for each kind of result: arrays, pairs, lists, numbers, texts, slices, changes in place
KINDS = ["gradient", "row_halves", "split_rows", "relative_error", "batch_size", "bound_by"]
KINDS += ["shards", "survivors", "cross_entropy", "fused_update"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_odd_results_are_refused_in_few_words(name):
    parameters = exercises.exercise(name).parameters
    for result in odd_results():
        function = functions("f", f"def f({', '.join(parameters)}): return result[0]")["f"]
        function.__globals__["result"] = [result]
        with pytest.raises(AnswerError) as caught:
            check(name, function)
        assert len(str(caught.value)) < 1000
    assert "call it yourself" not in message(name, lambda *_: None).lower()


def test_a_generator_is_no_list():
    text = message("split_rows", lambda a, b, n_parts: (row for row in a))
    assert "got a generator, which has still to be run: `list(…)` does so" in text


def test_an_unknown_mistake_is_no_mere_wrong():
    text = message("amdahl", lambda share, factor: 0.123)
    assert "expected 1.81818, got 0.123." in text
    assert text.endswith(
        "\nHint: call it yourself with a few small numbers, and reckon the result by hand."
    )


def test_results_of_a_wrong_shape_type_or_place(device):
    xp = device.xp
    transposed = message("gradient", lambda X, Y, W: W.T * 1, device=device)
    assert "expected shape (3, 2), got (2, 3). That is the right shape transposed." in transposed
    assert "expected shape" in message("gradient", lambda X, Y, W: X * 1, device=device)
    coarse = message("gradient", lambda X, Y, W: W.astype(np.float32), device=device)
    assert "expected numbers of type float64, got float32" in coarse
    nan = message("gradient", lambda X, Y, W: W * xp.nan, device=device)
    assert "not finite" in nan
    if device.kind == "gpu":
        host = message("gradient", lambda X, Y, W: gpuml.to_host(W), device=device)
        assert "the result is in the host's memory" in host
        there = message("there_and_back", lambda v, d: d.asarray(v), device=device)
        assert "still on the GPU" in there


def test_a_common_factor_is_said(device):
    right = answer("gradient")
    text = message("gradient", lambda X, Y, W: 7 * right(X, Y, W), device=device)
    assert "All are 7 times what they should be." in text
    assert "6 of 6 numbers are wrong; the first, [0, 0], should be" in text


def test_what_is_raised_is_said_with_the_line(device):
    wrong = answer("gradient", "2 / Y.size * X.T @ (X @ W - Y)", "2 / Y.size * X @ (X @ W - Y)")
    text = message("gradient", wrong, device=device)
    assert "it raised ValueError" in text
    assert "X was not transposed" in text

    def amdahl(share, factor):
        return share.nothing_of_that_name

    text = message("amdahl", amdahl)
    assert "it raised AttributeError: 'float' object has no attribute" in text
    assert "in `return share.nothing_of_that_name`" in text


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, RecursionError, GeneratorExit])
def test_what_else_is_raised_ends_the_answer_and_not_the_kernel(error):
    def amdahl(share, factor):
        raise error

    assert f"it raised {error.__name__}" in message("amdahl", amdahl)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3.0, "expected a function, got float: 3.0"),
        (None, "expected a function, got nothing (None)"),
        (lambda share: 1, "expected parameters (share, factor), got (share)"),
        (lambda: 1, "expected parameters (share, factor), got ()"),
        (lambda share, factor, x: 1, "got (share, factor, x)"),
    ],
)
def test_what_is_no_such_function_is_said(given, said):
    assert said in message("amdahl", given)


def test_other_names_and_default_values_are_fine():
    check("amdahl", lambda s, k, power=-1: (1 - s + s / k) ** power)
    check("amdahl", lambda *both: 1 / (1 - both[0] + both[0] / both[1]))


def test_the_stub_is_no_answer():
    for name in FUNCTIONS:
        head, _, rest = ANSWERS[name].partition("    ### BEGIN SOLUTION\n")
        _, _, tail = rest.partition("### END SOLUTION\n")
        stub = functions(name, f"{head}    raise NotImplementedError()\n{tail}")[name]
        assert "there is no answer yet" in message(name, stub)


def test_an_unknown_exercise_and_a_wrong_limit():
    with pytest.raises(ValueError, match="did you mean 'gradient'"):
        check("gradeint", len)
    with pytest.raises(ValueError, match="no size of memory"):
        check("gradient", len, memory_limit="much")


def product_by_hand(a, b):
    return a


def product_by_helper(a, b):
    return np.matmul(a, b)


def test_what_a_function_uses():
    from numpy import dot as times

    def dot(a, b):  # a reader's own, whatever it is called
        return product_by_hand(a, b)

    def harmless(a, b):
        """No `@`, no matmul: np.dot(a, b)."""
        matmul = dot(a, b)
        return matmul

    def nested(a, b):
        return [(lambda x: x @ b)(row) for row in a]

    def looped(n):
        while n:
            n -= 1

    names = {"@", "matmul", "dot", "for"}
    assert names & set(uses(harmless)) == set()
    assert "@" in set(uses(nested))
    assert "dot" in set(uses(lambda a, b: times(a, b)))
    assert "matmul" in set(uses(lambda a, b: product_by_helper(a, b)))
    assert "matmul" in set(uses(lambda a, b: gpuml.array_module(a).matmul(a, b)))
    assert "for" in set(uses(looped))
    assert "for" in set(uses(lambda a: sum(x for x in a)))
    assert set(uses(len)) == set()


def through_a_wrapper(function):
    # as a library would do it, whose names are not the notebook's
    return functools.wraps(function)(eval("lambda *a: f(*a)", {"f": function}))


class ProductWhenCalled:
    def __call__(self, a, b):
        return a @ b

    def method(self, a, b):
        return a @ b


def test_a_product_is_seen_behind_partials_methods_and_decorators():
    def plain(a, b):
        return a @ b

    hidden = [functools.partial(plain, b=1), ProductWhenCalled(), ProductWhenCalled().method]
    hidden += [through_a_wrapper(plain), functools.lru_cache(plain), functools.partial(hidden[1])]
    for product in hidden:
        assert "@" in set(uses(product))
        assert "@" in set(uses(lambda a, b: product(a, b)))  # noqa: B023
    assert "__matmul__" in set(uses(lambda a, b: a.__matmul__(b)))
    assert "for" in set(uses(lambda a: np.vectorize(abs)(a)))
    many = np.vectorize(abs)
    assert "for" in set(uses(lambda a: many(a)))
    assert "sum" in set(uses(lambda a: sum(a)))


def test_who_does_not_use_the_multiplier_is_told_so(device):
    def by_hand(a, b, tile, depth, multiply):
        return (a[:, :, None] * b[None]).sum(axis=1)

    text = message("tiled_product", by_hand, device=device)
    assert "`multiply` was called 0 times" in text


def test_a_forbidden_call_is_named_however_it_is_reached(device):
    def helper(x, y):
        return x @ y

    def tiled(a, b, tile, depth, multiply):
        return helper(a, b)

    assert "your function uses `@`, but here the products" in message(
        "tiled_product", tiled, device=device
    )


def test_the_message_is_all_that_a_notebook_shows():
    with pytest.raises(AnswerError) as caught:
        check("amdahl", lambda share, factor: 0.0)
    assert caught.value._render_traceback_() == [f"AnswerError: {caught.value}"]
    assert isinstance(caught.value, AssertionError)
    assert caught.value.__cause__ is None


# --- the sources -------------------------------------------------------------------------------


def test_each_notebook_has_its_exercises():
    course = {path.name for path in FOLDER.parent.glob("*.ipynb")}
    have = [path.name for path in SOURCES]
    assert course == set(have)
    assert [name[:2] for name in have] == [f"{i:02}" for i in range(12)]
    assert len(exercises.SUBJECTS) == len(SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_sources_follow_the_conventions(path):
    wanted = list(exercises.SUBJECTS.values())[SOURCES.index(path)]
    assert 2 <= len(wanted) <= 5
    every = cells(path)
    assert len({cell["id"] for cell in every}) == len(every)
    to_write = [cell for cell in every if nbgrader(cell).get("solution")]
    checked = [cell for cell in every if nbgrader(cell).get("grade")]
    assert [nbgrader(cell)["grade_id"] for cell in to_write] == list(wanted)
    assert [nbgrader(cell)["grade_id"] for cell in checked] == [f"check_{name}" for name in wanted]
    for name, cell in zip(wanted, to_write, strict=True):
        rest = {"locked": False, "grade": False, "task": False}
        assert nbgrader(cell) == rest | {
            "schema_version": 3, "cell_type": "code", "solution": True, "grade_id": name,
        }  # fmt: skip
        source = "".join(cell["source"])
        assert re.findall("### (BEGIN|END) SOLUTION\n?", source) == ["BEGIN", "END"]
        assert f"def {name}(" in source.partition("### BEGIN")[0]
        parameters = re.search(rf"def {name}\(([^)]*)\)", source)[1]
        assert parameters.split(", ") == exercises.exercise(name).parameters
    for name, cell in zip(wanted, checked, strict=True):
        assert "".join(cell["source"]) == f'check("{name}", {name})'
        points = nbgrader(cell)["points"]
        assert points in (1, 2, 3)
        assert nbgrader(cell) == {
            "schema_version": 3, "cell_type": "code", "solution": False, "grade": True,
            "locked": True, "task": False, "points": points, "grade_id": f"check_{name}",
        }  # fmt: skip
        about = next(c for c in every if c["id"] == f"about-{name.replace('_', '-')}")
        text = "".join(about["source"])
        assert f"*{points} point{'s' if points > 1 else ''}.*" in text
        assert "*Hint:*" in text


# --- in a notebook's kernel --------------------------------------------------------------------

IN_CELLS = {
    "def amdahl(share, factor):\n    while True:\n        pass\n\n"
    "check('amdahl', amdahl, time_limit=0.3)": "was stopped. Is there a loop",
    "def amdahl(share, factor):\n    print('here I am')\n\ncheck('amdahl', amdahl)": (
        "it printed here I am and returned nothing"
    ),
    "def amdahl(share, factor):\n    inverse = share.inverse\n\ncheck('amdahl', amdahl)": (
        "in `inverse = share.inverse`"
    ),
    "def amdahl(share, factor):\n    kept = []\n    while share:\n        kept.append([0] * 10**6)"
    "\n\ncheck('amdahl', amdahl, memory_limit='128 MiB')": "took too much memory",
    "def amdahl(share, factor):\n    return input()\n\ncheck('amdahl', amdahl)": "do not ask for",
    "def amdahl(share, factor):\n    exit()\n\ncheck('amdahl', amdahl)": "amdahl:",
    "def amdahl(share, factor):\n    return 1 / (1 - share + share / factor)\n\n"
    "print('before')\ncheck('amdahl', amdahl)": None,
}


def test_a_kernel_survives_bad_answers_and_shows_only_the_message(monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    from nbformat.v4 import new_code_cell, new_notebook

    monkeypatch.setenv("PYTHONPATH", str(Path(gpuml.__file__).parent.parent))
    first = "from gpuml.exercises import check"
    notebook = new_notebook(cells=[new_code_cell(source) for source in (first, *IN_CELLS)])
    nbclient.NotebookClient(notebook, timeout=60, allow_errors=True).execute()
    for cell, said in zip(notebook.cells[1:], IN_CELLS.values(), strict=True):
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if said is None:
            # a kernel sends what is printed in one piece or in several
            assert "".join(output.text for output in cell.outputs) == "before\namdahl: right.\n"
            continue
        [error] = errors
        assert error.ename == "AnswerError"
        assert said in error.evalue
        assert error.traceback == [f"AnswerError: {error.evalue}"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_students_copy_runs_up_to_the_first_exercise(path):
    from gpuml.copies import students_copy

    if "numba_cuda" in path.read_text(encoding="utf-8"):
        pytest.skip("kernels: test_kernels hands in the stub")
    made, first = {}, None
    for cell in json.loads(students_copy(path.read_bytes()))["cells"]:
        first = first or (nbgrader(cell).get("grade") and cell)
        if cell is first:
            break
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), made)
    with pytest.raises(AnswerError, match="there is no answer yet"):
        exec("".join(first["source"]), made)
