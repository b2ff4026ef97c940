// Batches of a stream's segments: what the decoding loop works on, prepared and checked by portable code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "decode.h"
#include "stream.h"

namespace lowbit {

// Consecutive segments of one panel.
struct Group {
    std::size_t first;
    int count;
};

// All segments that touch rows [first, last), in groups of at most SETS, as even as possible, at least `threads` of
// them where there are as many segments.
std::vector<Group> groups(const Stream& stream, std::size_t first, std::size_t last, int threads);

// A batch with what it owns: copies of segments that end so close to the blob's end that reading ahead would leave it.
class OpenBatch {
public:
    OpenBatch(const Stream& stream, const Group& group);
    Batch& batch() { return batch_; }
    // Whether every automaton ended in state 0 and every stream at its last byte.
    bool complete() const;

private:
    Batch batch_;
    std::vector<std::uint8_t> copies_[SETS];
};

}  // namespace lowbit
