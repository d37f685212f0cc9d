"""Load a policy.npz and act, with NumPy alone: `policies.load(path)(observations)` (docs/policy.md)."""

import json

import numpy as np


def load(path, index=0, seed=0):
    """A policy.npz of any script -> Policy.

    index: which of its policies (wurl_sac.py) or seeds (the learners), from 0; seed: of the noise, for a kind that
    cannot act without (`diffusion`). Raises envs.InputError where the file cannot be read, is no policy, is of a kind
    not known here, or has fewer policies.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        kind, about = str(arrays.pop("kind")), json.loads(str(arrays.pop("metadata_json")))
    except KeyError as error:
        raise _error(f"{path}: has no {error}; name a policy.npz that a script wrote") from None
    except Exception as error:  # not there, torn, no npz, ...
        raise _error(f"{path}: cannot be read ({error}); name a policy.npz that a script wrote") from None
    if kind not in KINDS:
        raise _error(f"{path}: holds '{kind}'; the kinds of policies are {', '.join(KINDS)}")
    try:
        arrays = {key: x.astype(np.float32) for key, x in arrays.items()}  # as JAX computes
        count = len(arrays[f"{KINDS[kind].body}/Dense_0/kernel"])
        if not 0 <= index < count:
            raise _error(f"{path}: has no policy {index}; choose an index from 0 to {count - 1}")
        return KINDS[kind]({k: x if k.startswith("schedule/") else x[index] for k, x in arrays.items()}, about, seed)
    except KeyError as error:
        raise _error(f"{path}: has no {error}; another version of the script wrote it, train anew") from None


class Policy:
    """policy(observations [.., S]) -> actions [.., A] in [-1, 1], float32.

    metadata: of the file, with `task` and `observations` ("env": the world's, "task": after the task's `observe`).
    """

    body = "actor/params"  # where the network's layers stand

    def __init__(self, arrays, metadata, seed):
        self.arrays, self.metadata, self.rng = arrays, metadata, np.random.default_rng(seed)
        self.layers = self.layers_of(self.body)
        self.action_size = self.layers[-1][0].shape[-1]
        self.angles = arrays.get("observation_angles", np.zeros(0)).astype(int)
        self.observation_size = len(self.layers[0][0]) - len(self.angles)

    def __call__(self, observations, noise=None):
        """noise: standard normal numbers to act with, else what the kind does by itself."""
        x = np.asarray(observations, np.float32)
        if x.shape[-1:] != (self.observation_size,):
            raise _error(f"observations {list(x.shape)}: the policy reads [.., {self.observation_size}] numbers")
        x = turned(x, self.angles)
        x = (x - self.arrays.get("observation_mean", 0)) / self.arrays.get("observation_std", np.float32(1))
        return self.act(x, noise)

    def act(self, x, noise):
        """tanh of the network's output; there is no noise in it."""
        return np.tanh(forward(self.layers, x))

    def layers_of(self, place, layer="Dense", weights="kernel"):
        """[(kernel, bias)] of the layers <place>/Dense_i, in the order of i; of LayerNorm_i its scales and biases."""
        count = sum(key.startswith(f"{place}/{layer}_") and key.endswith("/bias") for key in self.arrays)
        names = [f"{place}/{layer}_{i}" for i in range(max(count, layer == "Dense"))]
        return [(self.arrays[f"{name}/{weights}"], self.arrays[f"{name}/bias"]) for name in names]


class Gaussian(Policy):
    """The tanh of the mean, or with noise [.., A] of a sample."""

    body = "actor/params/MLP_0"

    def __init__(self, arrays, metadata, seed):
        super().__init__(arrays, metadata, seed)
        self.action_size //= 2  # the last layer gives a mean and a log standard deviation
        self.limits = metadata["log_std_min"], metadata["log_std_max"]

    def act(self, x, noise):
        mean, log_std = np.split(forward(self.layers, x), 2, -1)
        if noise is None:
            return np.tanh(mean)
        log_std = np.clip(log_std, *self.limits)
        return np.tanh(mean + np.exp(log_std) * np.asarray(noise, np.float32))


class Diffusion(Policy):
    """Of N_a samples the one of greatest Q, with noise [T, .., N_a, A], drawn where none is given."""

    body = "actor/params/trunk"

    def __init__(self, arrays, metadata, seed):
        super().__init__(arrays, metadata, seed)
        self.time, self.samples = self.layers_of("actor/params/time"), metadata["num_action_samples"]
        self.clips, self.temperature = metadata["clip_samples"], np.float32(metadata["temperature"])
        self.schedule = [arrays[f"schedule/{name}"] for name in ("beta", "alpha", "alpha_bar")]
        place = "critics/params/members"
        self.critics = self.layers_of(place) if self.samples > 1 else []  # [H, in, out], [H, out]
        self.norms = self.layers_of(place, "LayerNorm", "scale") if self.samples > 1 else []
        self.observation_size -= self.action_size + self.time[-1][0].shape[-1]  # the trunk reads [s, x, time]

    def act(self, s, noise):
        beta, alpha, bar = self.schedule
        steps, shape = len(beta) - 1, (*s.shape[:-1], self.samples, self.action_size)
        noise = self.rng.standard_normal((steps, *shape), np.float32) if noise is None else np.float32(noise)
        s = np.repeat(s[..., None, :], self.samples, -2)
        x = noise[0]
        for t in range(steps, 0, -1):
            eps = self.predicted(s, x, t)
            x0 = (x - np.sqrt(1 - bar[t]) * eps) / np.sqrt(bar[t])
            x0 = np.clip(x0, -1, 1) if self.clips else x0
            x = np.sqrt(bar[t - 1]) * beta[t] * x0 + np.sqrt(alpha[t]) * (1 - bar[t - 1]) * x
            x = x / (1 - bar[t])
            if t > 1:
                x = x + self.temperature * np.sqrt(beta[t]) * noise[steps + 1 - t]
        x = np.clip(x, -1, 1)
        if self.samples == 1:
            return x[..., 0, :]
        of = lambda h, layers: [(kernel[h], bias[h]) for kernel, bias in layers]
        inputs, members = np.concatenate([s, x], -1), range(len(self.critics[0][0]))
        q = sum(forward(of(h, self.critics), inputs, mish, of(h, self.norms)) for h in members)
        return np.take_along_axis(x, q.argmax(-2)[..., None], -2)[..., 0, :]

    def predicted(self, s, x, t):
        """The noise in x at step t, as the actor sees it: [.., A]."""
        half = len(self.time[0][0]) // 2
        angles = np.float32(t) * np.exp(-np.log(10_000.0) * np.arange(half) / (half - 1)).astype(np.float32)
        time = forward(self.time, np.concatenate([np.cos(angles), np.sin(angles)]), mish)
        return forward(self.layers, np.concatenate([s, x, np.broadcast_to(time, (*s.shape[:-1], len(time)))], -1), mish)


KINDS = {"tanh_gaussian": Gaussian, "tanh_deterministic": Policy, "diffusion": Diffusion}


def turned(x, angles):
    """Sines in the place of n angles, and their cosines behind: [.., S] -> [.., S + n]. As envs.buffers.turned, which
    comes with JAX."""
    x = x.copy()
    angle = x[..., angles]
    x[..., angles] = np.sin(angle)
    return np.concatenate([x, np.cos(angle)], -1)


def forward(layers, x, between=lambda x: np.maximum(x, 0), norms=()):
    """Fully connected layers [(kernel, bias)] with a function between them, before it LayerNorm [(scale, bias)]."""
    for i, (kernel, bias) in enumerate(layers):
        if i and norms:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + np.float32(1e-6))
            x = x * norms[i - 1][0] + norms[i - 1][1]
        x = (between(x) if i else x) @ kernel + bias
    return x


def mish(x):
    """x tanh(log(1 + e^x))."""
    return x * np.tanh(np.logaddexp(x, 0, dtype=np.float32))


def _error(text):
    """The error of all bad input. Imported here: `envs` needs JAX, and a good file does not."""
    from envs.errors import InputError

    return InputError(text)
