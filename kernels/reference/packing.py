"""Codes of 1 to 8 bits in one little-endian, LSB-first bit stream per row, held in uint32 words.

Eight codes of `bits` bits fill `bits` bytes at every width, so one formula serves them all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """Words [..., n * bits / 32] of codes [..., n], each below 2^bits; n is a multiple of 32."""
    *lead, count = codes.shape
    octets = codes.reshape(*lead, count // 8, 8)
    stream = np.zeros(octets.shape[:-1], "<u8")
    for i in range(8):
        stream |= octets[..., i].astype("<u8") << np.uint64(i * bits)
    used = stream[..., None].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(used).reshape(*lead, -1).view("<u4")


def unpack(words: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    """Codes [..., n] of words [..., n * bits / 32]."""
    *lead, count = words.shape
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(*lead, count * 4 // bits, bits)
    stream = np.zeros((*octets.shape[:-1], 8), np.uint8)
    stream[..., :bits] = octets
    joined = stream.view("<u8")[..., 0]
    codes = np.empty((*joined.shape, 8), np.uint8)
    mask = np.uint64(2**bits - 1)
    for i in range(8):
        codes[..., i] = (joined >> np.uint64(i * bits)) & mask
    return codes.reshape(*lead, -1)
