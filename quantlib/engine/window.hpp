// Geometry of convolutions over channel-last maps.
//
// The input is copied into a buffer with its padding; a pixel's window is then a few segments of contiguous bytes (a whole kernel row, or
// one tap where dilation or groups keep taps apart). Results of one output row are collected as int32 (O numbers per pixel) and stored in
// the output's own type. `correction` holds one row per class of border pixels: what to add to the raw sums.
#pragma once
#include "common.hpp"

namespace ql {

constexpr i64 BLOCK = 16;  // output channels side by side; weights are packed in blocks of so many

struct Window {
    i64 from_code, from, to_code, to, buffer, line;   // arena offsets; line: one row of results
    i64 height, width, channels, top, left, rows, cols;  // map, padding, size of the padded buffer
    i64 stride_h, stride_w, out_h, out_w, groups, per_group;  // per_group: output channels of a group
    i64 pixel, group;                                 // bytes from pixel to pixel and from group to group
    i64 segments, length;                             // length: words of the kernel per segment
    const i64* offset;                                // bytes from the window's corner to each segment
    const i32 *row_class, *col_class;
    i64 col_classes;
    const i32* correction;
    i64 blocks, outputs;

    explicit Window(Reader& r)
        : from_code(r()), from(r()), to_code(r()), to(r()), buffer(r()), line(r()), height(r()), width(r()), channels(r()), top(r()),
          left(r()), rows(r()), cols(r()), stride_h(r()), stride_w(r()), out_h(r()), out_w(r()), groups(r()), per_group(r()), pixel(r()),
          group(r()), segments(r()), length(r()), offset(r.table<i64>()), row_class(r.table<i32>()), col_class(r.table<i32>()),
          col_classes(r()), correction(r.table<i32>()), blocks((per_group + BLOCK - 1) / BLOCK), outputs(groups * per_group) {}

    const i32* correct(i64 row, i64 col, i64 g) const {
        return correction + ((row_class[row] * col_classes + col_class[col]) * groups + g) * blocks * BLOCK;
    }
};

/// The map as numbers of type B, with `zero` added, inside a border of `zero`.
template <class B>
inline void pad(const Window& w, u8* arena, B zero) {
    B* y = reinterpret_cast<B*>(arena + w.buffer);
    const i64 n = w.width * w.channels, line = w.cols * w.channels;
    if (w.rows != w.height || w.cols != w.width) std::fill(y, y + w.rows * line, zero);
    visit(w.from_code, [&](auto kind) {
        const auto* x = reinterpret_cast<const decltype(kind)*>(arena + w.from);
        for (i64 i = 0; i < w.height; ++i) {
            const auto* __restrict a = x + i * n;
            B* __restrict b = y + (w.top + i) * line + w.left * w.channels;
            for (i64 k = 0; k < n; ++k) b[k] = static_cast<B>(a[k] + zero);
        }
    });
}

}  // namespace ql
