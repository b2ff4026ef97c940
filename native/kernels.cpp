#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace lowbit {

#define LOWBIT_OF(isa) \
    {#isa, isa::store, isa::multiply, isa::packed_enter, isa::packed_multiply, isa::packed_decode, isa::norm, \
     isa::attend, isa::silu}

std::vector<const Kernels*> available() {
    static const Kernels portable_kernels = LOWBIT_OF(portable);
    std::vector<const Kernels*> out{&portable_kernels};
#if defined(__x86_64__)
    static const Kernels avx2_kernels = LOWBIT_OF(avx2);
    static const Kernels avx512_kernels = LOWBIT_OF(avx512);
    static const Kernels vbmi_kernels = LOWBIT_OF(vbmi);
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("popcnt") ||
        !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
        return out;
    }
    out.push_back(&avx2_kernels);
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl")) {
        return out;
    }
    out.push_back(&avx512_kernels);
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) out.push_back(&vbmi_kernels);
#elif defined(__aarch64__)
    static const Kernels neon_kernels = LOWBIT_OF(neon);
    out.push_back(&neon_kernels);
#endif
    return out;
}

const Kernels& kernels() {
    static const std::vector<const Kernels*> all = available();
    const char* wanted = std::getenv("LOWBIT_ISA");
    if (!wanted || !*wanted) return *all.back();
    for (const Kernels* k : all) {
        if (!std::strcmp(k->name, wanted)) return *k;
    }
    throw std::invalid_argument(std::string("LOWBIT_ISA=") + wanted + " is nothing that this processor runs");
}

}  // namespace lowbit
