// CRC-32C (Castagnoli), the checksum of TensorFlow's checkpoints.
//
// Maths    the remainder of the message polynomial modulo
//          x^32+x^28+x^27+x^26+x^25+x^23+x^22+x^20+x^19+x^18+x^14+x^13+x^11+x^10+x^9+x^8+x^6+1
//          over GF(2), bits reflected (0x82F63B78), register complemented before and after.
// Source   RFC 3720 (iSCSI), appendix B.4 holds the test vectors; Kounavis and Berry 2005 for the
//          eight tables; Gopal et al. 2011 (Intel) for three interleaved streams.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gpt2f {

// Checksum of `n` bytes at `data`. `seed` is the checksum of the bytes that come before them, 0 for
// none, so crc32c(b, n, crc32c(a, m)) is the checksum of a followed by b. Thread-safe, no
// allocation; `data` may be null when n is 0. Uses SSE4.2 where the CPU has it; same result.
uint32_t crc32c(const void* data, size_t n, uint32_t seed = 0);

// The same without special instructions: what other CPUs run, and what tests compare with.
uint32_t crc32c_portable(const void* data, size_t n, uint32_t seed = 0);

}  // namespace gpt2f
