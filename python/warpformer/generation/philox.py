import numpy as np

ROUNDS = 10
MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
WORD = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(seeds: np.ndarray, counters: np.ndarray, streams: np.ndarray) -> np.ndarray:
    """The random words [R, 4] of Philox4x32-10, each below 2 ** 32.

    Args:
        seeds: [R] uint64, the keys.
        counters: [R] uint64, the lower halves of the counters.
        streams: [R] uint64, the upper ones.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3"; csrc/core/philox.h is the same.
    """
    even = np.stack([counters & WORD, streams & WORD])  # words 0 and 2
    odd = np.stack([counters >> HALF, streams >> HALF])  # words 1 and 3
    keys = np.stack([seeds & WORD, seeds >> HALF])
    for _ in range(ROUNDS):
        products = (even * MULTIPLIERS[:, None])[::-1]
        even = (products >> HALF) ^ odd ^ keys
        odd = products & WORD
        keys = (keys + KEY_STEPS[:, None]) & WORD
    return np.stack([even[0], odd[0], even[1], odd[1]], -1)


def uniform(seeds: np.ndarray, counters: np.ndarray, streams: np.ndarray) -> np.ndarray:
    """[R] float64 numbers in [0, 1), multiples of 2 ** -52, of the first two words of `philox`."""
    words = philox(seeds, counters, streams)
    return ((words[:, 0] | words[:, 1] << HALF) >> np.uint64(12)) * 2.0**-52
