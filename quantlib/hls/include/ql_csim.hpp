// The simulated ends of the network and the report; never synthesised. Needs the streams of include/shim.
#pragma once
#include <string>
#include <vector>

#include "ql_glue.hpp"

namespace ql {

// One word per cycle from an array of integers in stream order.
template <typename T, unsigned N> void source(const int64_t* from, hls::stream<Word<T, N>>& out, uint64_t words, unsigned images) {
    for (uint64_t i = 0; i < words * images; ++i) {
        QL_CYCLE();
        Word<T, N> y;
        for (unsigned p = 0; p < N; ++p) y.v[p] = T(*from++);
        out.write(y);
    }
}

// One word per cycle into an array; `times` receives, per image, the cycle after its last word.
template <typename T, unsigned N>
void sink(hls::stream<Word<T, N>>& in, int64_t* to, uint64_t words, std::vector<uint64_t>* times, unsigned images) {
    for (unsigned n = 0; n < images; ++n) {
        for (uint64_t i = 0; i < words; ++i) {
            QL_CYCLE();
            const Word<T, N> x = in.read();
            for (unsigned p = 0; p < N; ++p) *to++ = int64_t(x.v[p]);
        }
#if QL_MODE == 0
        (void)times;
#else
        times->push_back(scheduler().current().now);
#endif
    }
}

// Lines "stage TICKS NAME", "channel MARK DEPTH NAME", "image TIME", "error TEXT", "blocked TEXT".
inline std::string report(const std::vector<std::vector<uint64_t>>& times, const std::string& error) {
    std::string text;
    if (!error.empty()) text += "error " + error + "\n";
#if QL_MODE != 0
    for (const auto& s : scheduler().ticks) text += "stage " + std::to_string(s.second) + " " + s.first + "\n";
    if (!scheduler().error.empty()) text += "error " + scheduler().error + "\n";
    std::string line;
    for (char c : scheduler().report + (scheduler().report.empty() ? "" : "\n")) {
        if (c == '\n') {
            text += "blocked " + line + "\n";
            line.clear();
        } else {
            line += c;
        }
    }
    for (size_t n = 0; !times.empty() && n < times[0].size(); ++n) {
        uint64_t last = 0;
        for (const auto& t : times)
            if (n < t.size() && t[n] > last) last = t[n];
        text += "image " + std::to_string(last) + "\n";
    }
#else
    (void)times;
#endif
    for (const Channel* c : channels()) text += "channel " + std::to_string(c->mark) + " " + std::to_string(c->depth) + " " + c->name + "\n";
    return text;
}

}  // namespace ql
