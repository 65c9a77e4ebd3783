"""Which tiles the GEMMs of a mixture of experts on Hopper (`sm90_wgmma`) have, by the rows that an expert is expected to have.

Few tokens per expert: loading weights takes the time, so a tile has many rows of weights and tokens are read less often. Many:
decoding weights does, so a tile has 128 rows by up to 256 tokens. docs/log/mxfp4_moe.md lists what was measured.
"""

import math
import statistics
from dataclasses import dataclass

from tilelang_ext.kernels.mxfp4_moe.problem import Problem
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import TILE
from tilelang_ext.kernels.sm90.roles import Roles

ROLES = Roles(num_consumers=2)
TILE_REGISTERS = 16  # of the left operand, for one tile of weights
FEATURES = TILE // 2  # of a tile of w13, which has a gate row and an up row for each
_MAX_SUBTILE_N = 64  # columns of hidden that a consumer stores at a time
_MAX_SUBTILE_M = 72  # tokens that a consumer stores at a time
_MAX_READY_GROUPS = 4  # groups of eight tokens, see `Config.ready_groups`
# Of accumulators and the left operand, see `Config.group_tiles`: by tiles of weights per consumer, and with several widths.
_GROUP_REGISTERS, _GROUP_REGISTERS_OF_WIDTHS = {1: 192, 2: 192, 4: 180}, 216
_NORMAL = statistics.NormalDist()


@dataclass(frozen=True)
class Config:
    """Most tokens of a tile, tiles of 64 rows of weights per consumer, stages of the pipeline, and smaller numbers of tokens.

    Where an expert has fewer tokens left, its tile has the smallest of `widths` that holds them.
    """

    block_M: int
    consumer_tiles: int
    num_stages: int
    narrower: tuple[int, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of tokens that tiles have, each of which has a main loop of its own."""
        return (*self.narrower, self.block_M)

    @property
    def box_M(self) -> int:
        """Tokens of one TMA load."""
        return math.gcd(*self.widths)

    @property
    def block_tiles(self) -> int:
        """Tiles of weights of a block."""
        return ROLES.num_consumers * self.consumer_tiles

    @property
    def rows(self) -> int:
        """Rows of weights of a block."""
        return self.block_tiles * TILE

    @property
    def group_tiles(self) -> int:
        """Tiles of weights of a consumer that are decoded together: all of a step if the registers suffice.

        MMAs of different tiles do not wait for each other's accumulators, which counts where they have few tokens.
        """
        # The compiler gives the main loop of each width accumulators of its own.
        accumulators = sum(self.consumer_tiles * width // 2 for width in self.widths)
        most = _GROUP_REGISTERS_OF_WIDTHS if self.narrower else _GROUP_REGISTERS[self.consumer_tiles]
        fits = (tiles for tiles in (4, 2, 1) if accumulators + 2 * tiles * TILE_REGISTERS <= most)
        return next((tiles for tiles in fits if self.consumer_tiles % tiles == 0), 1)

    @property
    def subtile_M(self) -> int:
        """Tokens that a consumer stores at a time: as many as divide the tile."""
        return next(tokens for tokens in range(_MAX_SUBTILE_M, 0, -8) if self.block_M % tokens == 0)

    @property
    def subtile_tiles(self) -> int:
        """Tiles of w13 whose features a consumer stores at a time."""
        return min(self.consumer_tiles, _MAX_SUBTILE_N // FEATURES)

    @property
    def ready_groups(self) -> int:
        """Groups of eight tokens whose results a thread computes before it stores the first: no load moves across a store."""
        return next(groups for groups in range(_MAX_READY_GROUPS, 0, -1) if self.subtile_M // 8 % groups == 0)


# Where loading weights takes most of the time: tiles for so many rows per expert, when all experts are equally busy, with fewer
# and fewer rows of weights. Each first one is the fastest of some on an H200, see docs/log/mxfp4_moe.md.
_FEW_TOKENS = {
    "bfloat16": (
        # (rows per expert up to, configs)
        (12, (Config(16, 4, 10), Config(16, 2, 18), Config(16, 1, 24))),  # tokens are read for 512 rows of weights
        (18, (Config(24, 4, 9), Config(24, 2, 17), Config(24, 1, 22))),
        (27, (Config(32, 4, 9), Config(32, 2, 14), Config(32, 1, 20))),
        (40, (Config(48, 2, 13), Config(48, 1, 18))),
        (80, (Config(80, 2, 9), Config(80, 1, 12))),
    ),
    "fp8": (
        (6, (Config(8, 2, 11), Config(8, 1, 16))),
        (12, (Config(16, 4, 5), Config(16, 2, 11), Config(16, 1, 16))),
        (17, (Config(24, 4, 5), Config(24, 2, 10), Config(24, 1, 15))),
        (27, (Config(32, 4, 5), Config(32, 2, 9), Config(32, 1, 14))),
        (40, (Config(48, 2, 8), Config(48, 1, 11))),
        (80, (Config(80, 2, 7), Config(80, 1, 9))),
    ),
}
# Where MMAs do: those of which one takes the least time by `_time`. All have been timed, on an H200.
_MANY_TOKENS = {
    "bfloat16": (Config(128, 2, 7), Config(192, 1, 7), Config(256, 1, 5)),
    "fp8": (Config(144, 1, 7), Config(192, 1, 6), Config(256, 1, 4), Config(256, 1, 4, (192,))),
}
# Of a step, beside its tokens, in tokens: by tiles of weights per consumer, and divided by the stages. Fitted to a few layers.
_TILE_COST, _STAGE_COST = {1: 40, 2: 32}, 64
_ANOTHER_LOOP = 1.05  # times as long, since the compiler gives each main loop registers of its own
_LESS_ROWS = 0.9  # of the time, from which fewer rows per tile are worth reading tokens more often
_QUANTILES = 16


def pick_config(problem: Problem) -> Config:
    """Return the tile for a problem, by the rows that an expert has when all experts are equally busy."""
    for most, configs in _FEW_TOKENS[problem.a_format]:
        if problem.rows_per_expert <= most:
            return configs[0]
    return min(_MANY_TOKENS[problem.a_format], key=lambda config: _time(config, problem))


def fitted(config: Config, problem: Problem, rows: int) -> Config:
    """Return `config` for weights of `rows` per expert, or one of fewer rows per tile if that takes a tenth less time.

    Time is taken to be the number of rows that an SM computes in all waves.
    """
    alternatives = next((configs for _, configs in _FEW_TOKENS[problem.a_format] if config in configs), (config,))

    def rows_of_sm(one: Config) -> int:
        tiles = math.ceil(_busy_experts(problem) * -(-rows // one.rows))
        return -(-tiles // problem.num_sms) * one.rows

    best = config
    for one in alternatives[alternatives.index(config) + 1 :]:
        best = one if rows_of_sm(one) < _LESS_ROWS * rows_of_sm(best) else best
    return best


def pick_configs(problem: Problem) -> tuple[Config, Config]:
    """Return the configurations of the first and of the second GEMM."""
    config = pick_config(problem)
    return fitted(config, problem, 2 * problem.intermediate_size), fitted(config, problem, problem.hidden_size)


def _busy_experts(problem: Problem) -> float:
    """Return how many of the experts here are expected to have rows, when all are equally likely.

    Tokens count as the next power of two, so that neighbours have the same kernels.
    """
    slots = problem.top_k << (problem.tokens - 1).bit_length()
    return problem.num_local_experts * (1 - (1 - 1 / problem.num_experts) ** slots)


def _time(config: Config, problem: Problem) -> float:
    """Return the time of both GEMMs, in tokens that an SM multiplies 128 rows of weights by, times K.

    The rows of an expert are taken to be distributed as the normal distribution, with the variance of independent choices.
    """
    tiles = cost = 0.0
    beside = _TILE_COST[config.consumer_tiles] + _STAGE_COST / config.num_stages
    for i in range(_QUANTILES):
        rows = _NORMAL.inv_cdf((i + 0.5) / _QUANTILES) * problem.rows_per_expert**0.5 + problem.rows_per_expert
        whole, rest = divmod(math.ceil(rows), config.block_M)
        widths = [config.block_M] * whole + ([next(n for n in config.widths if n >= rest)] if rest else [])
        tiles += len(widths) / _QUANTILES
        cost += sum(width + beside for width in widths) / _QUANTILES
    time = 0.0
    for rows, K in ((2 * problem.intermediate_size, problem.hidden_size), (problem.hidden_size, problem.intermediate_size)):
        all_tiles = problem.num_local_experts * tiles * -(-rows // config.rows)
        time += math.ceil(all_tiles / problem.num_sms) * cost / tiles * config.consumer_tiles * K
    return time * _ANOTHER_LOOP ** len(config.narrower)
