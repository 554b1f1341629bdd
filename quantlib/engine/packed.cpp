// Runs a program (see program.py) over images on several threads. Exact integers throughout; no state survives a call.
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "bits.hpp"
#include "dot.hpp"
#include "map.hpp"
#include "move.hpp"

namespace ql {

enum Kind {  // in the order of KINDS in program.py
    IN, OUT, MAP32, MAP64, GATHER, THERMOMETER, MAX, SUM32, SUM64, SATURATING32, SATURATING64,
    SIGNS1, SIGNS2, BYTE_DOT, PAIR_DOT, WIDE32, WIDE64, DEPTH16, DEPTH32, DEPTH64
};

void image(const i64* program, i64 words, const i64* codes, i64 number, i64* const* outputs, u8* arena) {
    for (const i64* at = program; at < program + words; at += at[1]) {
        const Reader r{at + 2};
        switch (at[0]) {
            case IN: image_in(r, codes, arena); break;
            case OUT: image_out(r, number, outputs, arena); break;
            case MAP32: map_group<i32>(r, arena); break;
            case MAP64: map_group<i64>(r, arena); break;
            case GATHER: gather(r, arena); break;
            case THERMOMETER: thermometer(r, arena); break;
            case MAX: max_pool(r, arena); break;
            case SUM32: sum_pool<i32>(r, arena); break;
            case SUM64: sum_pool<i64>(r, arena); break;
            case SATURATING32: saturating_dense<i32>(r, arena); break;
            case SATURATING64: saturating_dense<i64>(r, arena); break;
            case SIGNS1: sign_conv<1>(r, arena); break;
            case SIGNS2: sign_conv<2>(r, arena); break;
            case BYTE_DOT: dot_conv<BYTES>(r, arena); break;
            case PAIR_DOT: dot_conv<false>(r, arena); break;
            case WIDE32: wide_conv<i32>(r, arena); break;
            case WIDE64: wide_conv<i64>(r, arena); break;
            case DEPTH16: depthwise_short(r, arena); break;
            case DEPTH32: depthwise_conv<i32>(r, arena); break;
            case DEPTH64: depthwise_conv<i64>(r, arena); break;
        }
    }
}

}  // namespace ql

extern "C" {

/// Images codes[n][numel] through the program; outputs[k] is int64 [n][numel of output k]. One arena per thread, aligned to 64 bytes.
__attribute__((visibility("default"))) void ql_run(const std::int64_t* program, std::int64_t words, const std::int64_t* codes,
                                                   std::int64_t numel, std::int64_t images, std::int64_t* const* outputs,
                                                   std::uint8_t* const* arenas, std::int64_t threads) {
    std::atomic<std::int64_t> next{0};
    const auto work = [&](std::uint8_t* arena) {
        for (std::int64_t k; (k = next.fetch_add(1)) < images;)
            ql::image(program, words, codes + k * numel, k, outputs, arena);
    };
    std::vector<std::thread> others;
    try {
        for (std::int64_t t = 1; t < threads; ++t) others.emplace_back(work, arenas[t]);
    } catch (const std::system_error&) {  // no more threads: those that run share the images
    }
    work(arenas[0]);
    for (auto& t : others) t.join();
}

/// Bit 0: the machine multiplies bytes; bit 1: it counts bits in vectors.
__attribute__((visibility("default"))) std::int64_t ql_features() {
#if defined(QL_VPOPCNT)
    return (ql::BYTES ? 1 : 0) + 2;
#else
    return ql::BYTES ? 1 : 0;
#endif
}
}
