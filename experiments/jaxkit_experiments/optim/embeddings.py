"""Sign optimizers drive the embeddings of rare tokens to ±1/λ: the anomaly, and its remedies.

The momentum of a token that is not met keeps the sign of its last gradient, and a sign optimizer
moves such a row as far as any other, until weight decay λ holds it at ±1/λ. A small network that
predicts the next token from two is trained by

* `plain`: Tiger on everything;
* `lazy-param`, `lazy-full`: rows that no gradient touches stay, and in `full` their momentum too;
* `tied`: the output layer is the embedding with its features' halves swapped;
* `hybrid`: Adam on the embedding, Tiger on the rest;
* `lion`, `lion-lazy`: Lion, alone and in `lazy_rows`;

and `accumulation` compares Tiger on micro-batches with Tiger on whole batches, in weights and in
bytes of state.

    jaxkit run optim-embeddings --preset cpu
    jaxkit run optim-embeddings --preset gpu --data corpus.txt

The card's large task is a language model of 124M parameters at α = 1e-3 and λ = 0.01; the preset
`gpu` has these α and λ, a larger vocabulary, width and batch and ten times the steps, of the same
small network.

Sources: kexue.fm 9736 (the anomaly), 9512 and 8634 (Tiger and its accumulation); Chen et al. 2023,
Lion (arXiv 2302.06675).
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit.optim import lazy_rows, piecewise_linear, split_embeddings, tied_logits, tiger
from jaxkit_experiments.experiment import Claim, Context, Experiment, Results, Verdict
from jaxkit_experiments.plots import figure
from jaxkit_experiments.speed.optim import multi_steps, state_bytes
from jaxkit_experiments.training import train
from jaxkit_experiments.vq.text import Windows, held_out, read_corpus

__all__ = [
    "ARMS",
    "CARD",
    "EmbeddingAnomaly",
    "EmbeddingConfig",
    "NextToken",
    "Tokens",
    "constant_sign",
    "make_optimizer",
    "read_tokens",
]

TRAINED = ("plain", "lazy-param", "lazy-full", "tied", "hybrid", "lion", "lion-lazy")
ARMS = (*TRAINED, "accumulation")

# The methods card, least and greatest of 3 seeds: max|E|, share of rows beyond 0.5/λ, loss.
CARD: Mapping[str, Mapping[str, tuple[float, float]]] = {
    arm: dict(zip(("max_embedding", "share", "loss"), ranges, strict=True))
    for arm, ranges in {
        "plain": ((9.99, 10.0), (0.27, 0.27), (4.33, 4.33)),
        "lazy-param": ((0.76, 0.86), (0.0, 0.0), (4.26, 4.26)),
        "lazy-full": ((0.82, 1.02), (0.0, 0.0), (4.24, 4.24)),
        "tied": ((8.0, 8.9), (0.027, 0.027), (4.39, 4.55)),
        "hybrid": ((0.50, 0.57), (0.0, 0.0), (4.25, 4.25)),
    }.items()
}

# The card: bytes of state for each float32 parameter; "4x": with accumulation of 4 micro-batches.
BYTES: Mapping[str, float] = {
    "tiger 4x": 4,
    "tiger 4x bfloat16": 2,
    "lion": 4,
    "lion 4x": 8,
    "adamw": 8,
    "adamw 4x": 12,
    "lamb 4x": 12,
}


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """The task, the rates, and the comparison of micro-batches.

    Attributes:
      arms: see the module.
      seeds: of weights and batches.
      steps: updates.
      batch_size: predicted tokens of an update.
      vocabulary: tokens V; the last of them stand for the most frequent words, 0 for all others.
      dim: features of the embedding; even.
      hidden: width of the hidden layer.
      rate: α, Tiger's relative rate, at its highest.
      lion_rate: that of Lion, which is absolute.
      adam_rate: that of Adam on the embedding.
      warmup: steps from zero to the highest rate, which then falls linearly to a tenth.
      weight_decay: λ.
      init_scale: standard deviation of the embedding at first.
      held_out: tokens to evaluate on.
      evaluate_every: steps between evaluations.
      micro_batches: k of the arm `accumulation`.
      accumulation_steps: updates of the arm `accumulation`.
    """

    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0,)
    steps: int = 3000
    batch_size: int = 256
    vocabulary: int = 4096
    dim: int = 32
    hidden: int = 64
    rate: float = 1e-2
    lion_rate: float = 1e-2
    adam_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.1
    init_scale: float = 0.02
    held_out: int = 4096
    evaluate_every: int = 150
    micro_batches: int = 4
    accumulation_steps: int = 300

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        for name in ("batch_size", "hidden", "held_out", "evaluate_every", "accumulation_steps"):
            check_int(name, getattr(self, name), least=1)
        check_int("vocabulary", self.vocabulary, least=2)
        check_int("micro_batches", self.micro_batches, least=2)
        check_int("warmup", self.warmup, least=1)
        check_int("steps", self.steps, least=self.warmup + 1)
        for name in ("rate", "lion_rate", "adam_rate", "weight_decay", "init_scale"):
            check_real(name, getattr(self, name), above=0.0)
        if check_int("dim", self.dim, least=2) % 2:
            raise ValueError(f"dim must be even, to swap halves; got {self.dim}.")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"micro_batches must divide batch_size = {self.batch_size}; "
                f"got {self.micro_batches}."
            )
        if not self.seeds:
            raise ValueError("seeds must hold at least one seed; got none.")


# --- task --------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """A corpus as numbers of words, int32: nine tenths to train, the last one held out."""

    train: np.ndarray
    held_out: np.ndarray
    words: tuple[bytes, ...]


@cache
def read_tokens(vocabulary: int, path: str | Path | None = None) -> Tokens:
    r"""Words of letters, digits and underscores, and single other characters that are no space.

    The vocabulary is that of the whole corpus, so that as in any published tokenizer some tokens
    are met rarely in training, or never.

    Args:
      vocabulary: V; word 0 stands for all but the V - 1 most frequent ones.
      path: a file, or a folder of `.py` files; by default the Python standard library's source.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: the corpus has fewer than V different words.

    Example:
      >>> tokens = read_tokens(20, __file__)
      >>> len(tokens.words), int(tokens.train.max()) < 20
      (20, True)
    """
    corpus = read_corpus(path)
    words = [re.findall(rb"\w+|[^\w\s]", part.tobytes()) for part in corpus]
    counts: Counter[bytes] = Counter()
    for part in words:
        counts.update(part)
    if len(counts) < vocabulary:
        raise ValueError(
            f"vocabulary must be at most the {len(counts)} different words of the data; "
            f"got {vocabulary}."
        )
    kept = (b"", *(word for word, _ in counts.most_common(vocabulary - 1)))
    number = {word: n for n, word in enumerate(kept)}
    train, *rest = (
        np.fromiter((number.get(word, 0) for word in part), np.int32, len(part)) for part in words
    )
    return Tokens(train, np.concatenate(rest), kept)


class NextToken(nnx.Module):
    """Logits of the next token from two: embedding, a tanh layer, and an output layer."""

    def __init__(self, config: EmbeddingConfig, *, tied: bool = False, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.init_scale)
        self.tied = tied
        self.embed = nnx.Embed(config.vocabulary, config.dim, embedding_init=init, rngs=rngs)
        self.hidden = nnx.Linear(2 * config.dim, config.hidden, rngs=rngs)
        width = config.dim if tied else config.vocabulary
        self.out = nnx.Linear(config.hidden, width, use_bias=False, rngs=rngs)

    def __call__(self, context: jax.Array) -> jax.Array:
        """`[batch, 2]` int32 to `[batch, vocabulary]`."""
        x = self.embed(context).reshape(len(context), -1)
        y = self.out(jnp.tanh(self.hidden(x)))
        return tied_logits(y, self.embed.embedding[...]) if self.tied else y


def mean_loss(model: Any, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of the last of three tokens, `[batch, 3]`, in nats."""
    logits = model(windows[:, :2])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 2]))


def largest(model: Any) -> jax.Array:
    """Largest absolute value of every row of the embedding, `[vocabulary]`."""
    return jnp.max(jnp.abs(model.embed.embedding[...]), axis=-1)


# --- optimizers --------------------------------------------------------------------------------


def schedule(config: EmbeddingConfig, peak: float) -> optax.Schedule:
    """From zero to `peak` in the warm-up, then to a tenth of it at the last step."""
    return piecewise_linear({config.warmup: 1.0, config.steps: 0.1}, peak=peak)


def make_optimizer(config: EmbeddingConfig, arm: str) -> optax.GradientTransformationExtraArgs:
    """The optimizer of an arm.

    Example:
      >>> optimizer = make_optimizer(EmbeddingConfig(), "lazy-full")
    """
    check_choice("arm", arm, TRAINED)
    rate = partial(schedule, config)
    sign = partial(tiger, rate(config.rate), weight_decay=config.weight_decay)
    lion = optax.lion(rate(config.lion_rate), weight_decay=config.weight_decay)
    if arm == "hybrid":
        return split_embeddings(optax.adam(rate(config.adam_rate)), sign())
    if arm == "lion-lazy":
        return lazy_rows(lion)
    if arm == "lion":
        return optax.with_extra_args_support(lion)
    lazy: Any = arm.removeprefix("lazy-") if arm.startswith("lazy-") else None
    return sign(lazy=lazy)


def constant_sign(
    rates: np.ndarray, weight_decay: float, start: float, *, relative: bool
) -> np.ndarray:
    """A weight whose momentum never changes its sign, which points away from zero.

    Of a relative rate α, `x ← x [1 + α (1 - λx)]`, a logistic; of a rate η,
    `x ← x + η (1 - λx) = 1/λ - Π (1 - ηλ) (1/λ - x_0)`. Both end at 1/λ.

    Args:
      rates: `[steps]`.
      weight_decay: λ.
      start: x_0, positive: the size of the weight, or of its row if the rate is relative to it.
      relative: whether it is, as Tiger's, or not, as Lion's.

    Returns:
      `[steps + 1]`, x_0 first.

    Example:
      >>> path = constant_sign(np.full(8521, 1e-3), 0.01, 0.02, relative=True)
      >>> bool(path[-2] < 50 < path[-1] + 0.1)
      True
    """
    path = [start]
    for rate in np.asarray(rates, np.float64):
        x = path[-1]
        path.append(x + rate * (x if relative else 1.0) * (1 - weight_decay * x))
    return np.array(path)


def limit(config: EmbeddingConfig, arm: str) -> np.ndarray:
    """`constant_sign` of a row of the usual size, under the rates of Tiger, or of Lion."""
    lion = arm.startswith("lion")
    peak = config.lion_rate if lion else config.rate
    knots = ([0, config.warmup, config.steps], [0.0, peak, 0.1 * peak])
    rates = np.interp(np.arange(config.steps), *knots)
    return constant_sign(rates, config.weight_decay, config.init_scale, relative=not lion)


def _optimizers(k: int) -> dict[str, optax.GradientTransformation]:
    """Those of `BYTES`, with accumulation of `k` micro-batches."""
    return {
        "tiger 4x": tiger(1e-3, accumulation_steps=k),
        "tiger 4x bfloat16": tiger(1e-3, accumulation_steps=k, mu_dtype=jnp.bfloat16),
        "lion": optax.lion(1e-3),
        "lion 4x": multi_steps(optax.lion(1e-3), k),
        "adamw": optax.adamw(1e-3),
        "adamw 4x": multi_steps(optax.adamw(1e-3), k),
        "lamb 4x": multi_steps(optax.lamb(1e-3), k),
    }


def first_weights(config: EmbeddingConfig) -> Any:
    """The model's weights before training, `nnx.State` with an axis for the seeds in front."""

    def draw(key: jax.Array) -> Any:
        parts: Any = nnx.split(NextToken(config, rngs=nnx.Rngs(key)))
        return parts[1]

    return jax.jit(jax.vmap(draw))(jnp.stack([jax.random.key(seed) for seed in config.seeds]))


def weights_after(config: EmbeddingConfig, k: int, weights: Any, windows: np.ndarray) -> Any:
    """Weights after Tiger has seen the batches, each as `k` micro-batches.

    Args:
      config: of the model and the rates.
      k: micro-batches of a batch.
      weights: `first_weights`.
      windows: `[seeds, updates, batch, 3]`.

    Returns:
      The weights; float64 where JAX has it.
    """
    wide = jax.dtypes.canonicalize_dtype(np.float64)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: NextToken(config, rngs=nnx.Rngs(0))))
    rate = schedule(config, config.rate)
    optimizer = tiger(
        lambda count: rate(count // k), weight_decay=config.weight_decay, accumulation_steps=k
    )

    def step(carry: Any, batch: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(lambda p: mean_loss(nnx.merge(graphdef, p), batch))(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(params: Any, micro: jax.Array) -> Any:
        params = jax.tree.map(lambda leaf: leaf.astype(wide), params)
        return jax.lax.scan(step, (params, optimizer.init(params)), micro)[0][0]

    seeds, _, batch, _ = windows.shape
    return jax.jit(jax.vmap(run))(weights, windows.reshape(seeds, -1, batch // k, 3))


# --- claims ------------------------------------------------------------------------------------


def _far(results: Results) -> float:
    return 0.5 / results.config.weight_decay


def drifted(check: Callable[[Results], Verdict]) -> Callable[[Results], Verdict]:
    """The check, but not of a training too short for a row to go from its first size to ±1/λ."""

    def checked(results: Results) -> Verdict:
        reached = limit(results.config, "plain")[-1] * results.config.weight_decay
        if reached < 0.9:
            return Verdict("not testable", f"a constant sign gets to {reached:.2f}/λ, 0.9/λ needed")
        return check(results)

    return checked


def _drives(results: Results) -> Verdict:
    reached = results.mean("plain", "max_embedding") * results.config.weight_decay
    share = results.mean("plain", "share")
    return Verdict.of(
        abs(reached - 1) <= 0.01 and share >= 0.1,
        f"max|E| {reached:.4f}/λ, {100 * share:.1f} % of rows beyond 0.5/λ",
    )


def _cured(*arms: str) -> Callable[[Results], Verdict]:
    """No row far out, and a smaller loss than `plain`."""

    def check(results: Results) -> Verdict:
        plain = results.mean("plain", "loss")
        rows = {
            arm: tuple(results.mean(arm, name) for name in ("max_embedding", "loss"))
            for arm in arms
        }
        return Verdict.of(
            all(size < _far(results) and loss < plain for size, loss in rows.values()),
            f"loss of plain {plain:.3f}; "
            + "; ".join(
                f"{arm} max|E| {size:.2f}, loss {loss:.3f}" for arm, (size, loss) in rows.items()
            ),
        )

    return check


def _tied(results: Results) -> Verdict:
    size, never = (results.mean("tied", name) for name in ("max_embedding", "never_targets"))
    return Verdict.of(
        size > _far(results) and never >= 0.9,
        f"max|E| {size:.2f}; {100 * never:.0f} % of the rows beyond 0.5/λ were never targets",
    )


def _lion(results: Results) -> Verdict:
    size, path = results.mean("lion", "max_embedding"), limit(results.config, "lion")[-1]
    return Verdict.of(abs(size / path - 1) <= 0.05, f"max|E| {size:.3f}, closed form {path:.3f}")


def _lion_lazy(results: Results) -> Verdict:
    half = limit(results.config, "lion")[-1] / 2
    size = results.mean("lion-lazy", "max_embedding")
    lazy, plain = (results.mean(arm, "loss") for arm in ("lion-lazy", "lion"))
    return Verdict.of(
        size < half and lazy < plain,
        f"max|E| {size:.3f}, half of the closed form {half:.3f}; loss {lazy:.3f} for {plain:.3f}",
    )


def _card(metric: str, tolerance: float, *, relative: bool) -> Callable[[Results], Verdict]:
    """The metric within the card's ranges, widened by `tolerance` (of their ends, if relative)."""

    def check(results: Results) -> Verdict:
        config = EmbeddingAnomaly.presets["cpu"]
        changes = {"arms": config.arms, "seeds": config.seeds}
        if dataclasses.replace(results.config, **changes) != config:
            return Verdict("not testable", "the card's numbers are those of the preset cpu")
        wrong = []
        for arm, of in CARD.items():
            low, high = of[metric]
            got = results.mean(arm, metric)
            margins = [tolerance * (end if relative else 1.0) for end in (low, high)]
            if not low - margins[0] <= got <= high + margins[1]:
                asked = f"{low:g}" if low == high else f"{low:g} to {high:g}"
                wrong.append(f"{arm} {got:.3f} for {asked}")
        text = f"{len(CARD) - len(wrong)} of {len(CARD)} arms"
        return Verdict.of(not wrong, "; ".join([text, *wrong]))

    return check


def _same_weights(metric: str) -> Callable[[Results], Verdict]:
    def check(results: Results) -> Verdict:
        worst = float(np.max(results.metric("accumulation", metric)))
        return Verdict.of(worst <= 1e-5, f"largest difference of a weight {worst:.2g}")

    return check


def _same_weights_in_float32(results: Results) -> Verdict:
    """Where a momentum is as small as its rounding, its sign depends on the order of sums."""
    apart = 100 * results.mean("accumulation", "apart")
    verdict = _same_weights("difference")(results)
    detail = f"{verdict.detail}; {apart:.2g} % of weights differ by more than 1e-5"
    return dataclasses.replace(verdict, detail=detail)


def _bytes(results: Results) -> Verdict:
    got = {name: results.mean("accumulation", f"bytes[{name}]") for name in BYTES}
    return Verdict.of(
        got == dict(BYTES),
        ", ".join(f"{name} {value:g}" for name, value in got.items()),
    )


# --- experiment --------------------------------------------------------------------------------


class EmbeddingAnomaly(Experiment):
    """Embeddings under sign optimizers, and accumulation in the momentum.

    Metrics of an arm that trains: `max_embedding`, max|E|; `share` of rows with max|E| > 0.5/λ;
    `never_targets`, how many of these are tokens that no batch had to predict (NaN if there are no
    such rows); held-out `loss` in nats. Of `accumulation`: `difference`, the largest of a weight
    between k micro-batches and whole batches, `apart`, the share of weights that differ by more
    than 1e-5, and `difference_x64`, the same in float64; `bytes[OPTIMIZER]` of state per parameter.
    """

    name = "optim-embeddings"
    title = "Embeddings under sign optimizers: rare tokens drift to ±1/λ, and what stops them"
    description = (
        "Next token from two, on the words of the Python standard library's source, by Tiger with "
        "five treatments of the embedding and by Lion with two; `share` is of rows with max|E| "
        "beyond half of 1/λ. `accumulation`: micro-batches against whole batches."
    )
    sources = ("kexue.fm 9736", "kexue.fm 9512", "kexue.fm 8634", "arXiv 2302.06675")
    config_class = EmbeddingConfig
    arms = ARMS
    columns = ("max_embedding", "share", "loss", "difference", "difference_x64")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        arm: {metric: sum(ends) / 2 for metric, ends in of.items()} for arm, of in CARD.items()
    }
    paper_note = (
        "The numbers beside are the methods card's, the middles of their ranges, 3 seeds; it does "
        "not say how it cuts words and draws the first embedding, or which rate Adam has."
    )
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": EmbeddingConfig(
            arms=("plain", "lazy-full", "tied", "accumulation"),
            steps=20,
            batch_size=16,
            vocabulary=64,
            dim=4,
            hidden=4,
            warmup=5,
            held_out=64,
            evaluate_every=10,
            accumulation_steps=5,
        ),
        "cpu": EmbeddingConfig(),
        "gpu": EmbeddingConfig(
            seeds=(0, 1, 2),
            steps=30_000,
            batch_size=1024,
            vocabulary=16_384,
            dim=256,
            hidden=512,
            rate=1e-3,
            lion_rate=1e-3,
            warmup=2000,
            weight_decay=0.01,
            held_out=16_384,
            evaluate_every=1000,
        ),
    }
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim(
            "Tiger drives rows to ±1/λ, within 1 percent, and a tenth of all rows half the way.",
            "kexue.fm 9736; methods card (9.99 to 10.00 of 10, 27 % of rows)",
            drifted(_drives),
        ),
        Claim(
            "Lazy rows stay within 0.5/λ, and the held-out loss is smaller.",
            "kexue.fm 9736; methods card (0.76 to 1.02; 4.26 and 4.24 for 4.33)",
            drifted(_cured("lazy-param", "lazy-full")),
        ),
        Claim(
            "So it is with Adam on the embedding.",
            "arXiv 2302.06675; methods card (0.50 to 0.57; 4.25)",
            drifted(_cured("hybrid")),
        ),
        Claim(
            "Tied embeddings do not cure tokens that are never targets: those, to 90 percent, are "
            "the rows beyond 0.5/λ.",
            "methods card (8.0 to 8.9, 2.7 % of rows)",
            drifted(_tied),
        ),
        Claim(
            "Lion drives them as far as a constant sign can, within 5 percent.",
            "methods card, closed form; kexue.fm 9736",
            drifted(_lion),
        ),
        Claim(
            "In lazy_rows Lion's stay within half of that, and the held-out loss is smaller.",
            "kexue.fm 9736",
            drifted(_lion_lazy),
        ),
        Claim(
            "max|E| is the card's, within 10 percent of its range.",
            "methods card",
            _card("max_embedding", 0.1, relative=True),
        ),
        Claim(
            "Shares of rows are the card's, within 0.02.",
            "methods card",
            _card("share", 0.02, relative=False),
        ),
        Claim(
            "Held-out losses are the card's, within 0.1.",
            "methods card",
            _card("loss", 0.1, relative=False),
        ),
        Claim(
            "Micro-batches give the weights of whole batches to 1e-5, in float64.",
            "kexue.fm 8634; methods card",
            _same_weights("difference_x64"),
        ),
        Claim("So they do in float32.", "methods card", _same_weights_in_float32),
        Claim(
            "The state has the card's bytes per parameter: Tiger's accumulation has none.",
            "methods card, Algorithm",
            _bytes,
        ),
    )

    def run_arm(
        self, config: EmbeddingConfig, arm: str, ctx: Context
    ) -> Mapping[str, Sequence[float]]:
        tokens = read_tokens(config.vocabulary, ctx.data)
        sources = [Windows(tokens.train, seed, config.batch_size, 2) for seed in config.seeds]
        if arm == "accumulation":
            return self._accumulate(config, sources, ctx)

        far = 0.5 / config.weight_decay
        data = held_out(
            tokens.held_out, 2, count=config.held_out, batch_size=min(config.held_out, 1024)
        )

        def loss(model: Any, batch: Any, key: jax.Array) -> Any:
            del key
            return mean_loss(model, batch["bytes"]), {}

        def evaluate(model: Any, data: jax.Array) -> Any:
            rows = largest(model)
            return {
                "loss": jnp.mean(jax.lax.map(partial(mean_loss, model), data)),
                "max_embedding": jnp.max(rows),
                "share": jnp.mean((rows > far).astype(jnp.float32)),
            }

        start = time.perf_counter()
        result = train(
            init=lambda key: NextToken(config, tied=arm == "tied", rngs=nnx.Rngs(key)),
            loss=loss,
            optimizer=make_optimizer(config, arm),
            batches=sources,
            steps=config.steps,
            seeds=config.seeds,
            evaluate=evaluate,
            evaluation_data=data,
            evaluate_every=config.evaluate_every,
            chunk=config.evaluate_every,
            ctx=ctx,
            name=arm,
        )
        seconds = time.perf_counter() - start
        rows = np.stack([largest(result.model(n)) for n in range(len(config.seeds))])
        met, targets = map(
            np.stack, zip(*(_occurrences(config, source) for source in sources), strict=True)
        )
        ctx.save_arrays(f"rows-{arm}", rows=rows, met=met)
        return {name: values.tolist() for name, values in result.metrics.items()} | {
            "never_targets": _never_targets(rows > far, targets),
            "seconds": [seconds] * len(config.seeds),
        }

    def _accumulate(
        self, config: EmbeddingConfig, sources: Sequence[Windows], ctx: Context
    ) -> Mapping[str, Sequence[float]]:
        """Micro-batches against whole batches, and the bytes of states."""
        weights = first_weights(config)
        windows = np.stack(
            [
                [source[step]["bytes"] for step in range(config.accumulation_steps)]
                for source in sources
            ]
        )
        metrics: dict[str, list[float]] = {}
        with ctx.progress("accumulation", 4) as task:
            for wide in (False, True):
                flat = []
                with jax.enable_x64(wide):
                    for k in (1, config.micro_batches):
                        leaves = jax.tree.leaves(weights_after(config, k, weights, windows))
                        flat.append(
                            np.concatenate([np.reshape(x, (len(sources), -1)) for x in leaves], 1)
                        )
                        task.advance()
                apart = np.abs(flat[0] - flat[1])
                metrics["difference_x64" if wide else "difference"] = apart.max(1).tolist()
                if not wide:
                    metrics["apart"] = np.mean(apart > 1e-5, axis=1).tolist()
        one = jax.tree.map(lambda leaf: leaf[0], weights)
        for name, optimizer in _optimizers(config.micro_batches).items():
            metrics[f"bytes[{name}]"] = [state_bytes(optimizer, one)] * len(sources)
        return metrics

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        """max|E| over training beside the closed forms, and every row against its occurrences."""
        config = results.config
        arms = [arm for arm in results.arms if arm in TRAINED]
        if not arms:
            return []
        files = [ctx.run_dir / "plots" / f"{name}.png" for name in ("drift", "rows")]
        with figure(files[0]) as axis:
            for number, arm in enumerate(arms):
                points = [
                    (record["step"], np.mean(record["max_embedding"]))
                    for record in ctx.history(arm)
                    if record.get("split") == "evaluation"
                ]
                axis.plot(*zip(*points, strict=True), color=f"C{number}", label=arm)
            for arm, style, label in (("plain", "--", "Tiger"), ("lion", ":", "Lion")):
                if arm in arms:
                    axis.plot(
                        limit(config, arm),
                        style,
                        color="0.4",
                        lw=1,
                        label=f"{label}, constant sign",
                    )
            axis.axhline(1 / config.weight_decay, color="0.8", lw=0.8)
            axis.set_yscale("log")
            axis.set_xlabel("step")
            axis.set_title("max|E|, and 1/λ", fontsize=10)
            axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        shape = {"columns": min(len(arms), 4), "rows": -(-len(arms) // 4)}
        with figure(
            files[1],
            **shape,
            squeeze=False,
            sharex=True,
            sharey=True,
            figsize=(11, 2.8 * shape["rows"]),
        ) as axes:
            for axis in axes.flat[len(arms) :]:
                axis.set_axis_off()
            for axis, arm in zip(axes.flat, arms, strict=False):
                kept = ctx.load_arrays(f"rows-{arm}")
                axis.plot(1 + kept["met"][0], kept["rows"][0], ".", ms=2, alpha=0.4, mew=0)
                axis.axhline(0.5 / config.weight_decay, color="0.6", lw=0.8)
                axis.set_xscale("log")
                axis.set_yscale("log")
                share = results.metric(arm, "share")[0]
                axis.set_title(f"{arm}: {100 * share:.1f} % beyond 0.5/λ", fontsize=10)
                axis.set_xlabel("1 + occurrences in training")
            axes[0][0].set_ylabel("max|E| of a token")
        return files


def _occurrences(config: EmbeddingConfig, source: Windows) -> tuple[np.ndarray, np.ndarray]:
    """How often every token was in the batches, and how often it was a target."""
    windows = np.concatenate([source[step]["bytes"] for step in range(config.steps)])
    count = partial(np.bincount, minlength=config.vocabulary)
    return count(windows.ravel()), count(windows[:, 2])


def _never_targets(far: np.ndarray, targets: np.ndarray) -> list[float]:
    """Share of tokens that were never targets among those that are far out, NaN if none is."""
    count = np.sum(far, axis=1)
    never = np.sum(far & (targets == 0), axis=1)
    return (never / np.where(count > 0, count, np.nan)).tolist()
