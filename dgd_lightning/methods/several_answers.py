"""Several answers per prompt, drawn from the target, for methods that choose among them."""

from collections.abc import Sequence

from torch import Tensor

from dgd_lightning.decode.call import Call
from dgd_lightning.decode.random_source import row_seeds
from dgd_lightning.errors import InputError
from dgd_lightning.methods.autoregressive import Autoregressive
from dgd_lightning.methods.speculative import Speculative
from dgd_lightning.pair import Pair
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.types import DecodeOutput


def check_differ(temperature: float, hint: str = "use temperature=1.0") -> None:
    """Answers among which one is chosen must be able to differ."""
    if temperature == 0:
        raise InputError(
            "temperature",
            expected="above 0: greedy answers are all the same",
            received=temperature,
            hint=hint,
        )


def check_one_answer(call: Call) -> None:
    """One answer of each prompt is returned."""
    if call.num_return_sequences != 1:
        raise InputError(
            "num_return_sequences",
            expected="1: one answer of each prompt is chosen",
            received=call.num_return_sequences,
            hint="use 1; num_answers says how many are drawn",
        )


def drawn_answers(
    pair: Pair, prompts: Sequence[Tensor], call: Call, count: int, block_size: int | None
) -> list[list[DecodeOutput]]:
    """So many answers of each prompt, from drafted blocks where there is a draft."""
    check_one_answer(call)
    seed = call.seed
    if isinstance(seed, Sequence):  # a prompt's own seed gives its answers theirs
        seed = [mixed_seed(own, number) for own in row_seeds(seed, len(prompts)) for number in range(count)]
    method = Autoregressive() if pair.draft is None else Speculative(block_size)
    drawn = method.generate(pair, prompts, call._replace(seed=seed, num_return_sequences=count))
    return [drawn[at : at + count] for at in range(0, len(drawn), count)]
