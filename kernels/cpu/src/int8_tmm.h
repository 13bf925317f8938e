// int8, many tokens, on tile registers (AMX): what int8_many.h does, to the bit.
//
// A tile register takes 16 tokens of one group as rows and the codes of 16 rows of the matrix as Tile holds them; the
// sums of all 256 pairs come at once, and go through memory to be scaled. So activations are copied into panels first,
// 16 tokens to a group, once for all rows of a call.
//
// Beside `V` (int8_impl.h), the including file defines
//   start<G>(), stop()        around each call: registers are set up for 16 rows of at most 64 bytes, and let go
//   dot<set, G>(x, w, out)    out[token][row] = sums over G columns of x[token][G] and w[G / 4][row][4]; `set`, 0 or 1,
//                             names the registers, so that two can be under way
#pragma once

#include "int8_tile.h"

namespace mixbit {
namespace {

constexpr int panel_tokens = 16;

template <int G>
constexpr int slice_panels = G == 128 ? 4 : 8;  // of tokens that meet a tile while it is filled
template <int G>
constexpr int slice_tokens = panel_tokens * slice_panels<G>;

// A chunk of a slice's activations. codes are in the order of Tile's; factors and sums lie as in the rows of x.
template <int G>
struct Panels {
  alignas(64) std::byte codes[slice_panels<G>][chunk_groups<G>][panel_tokens][G];
  float factors[slice_tokens<G>][chunk_groups<G>];
  float sums[slice_tokens<G>][chunk_groups<G>];
};

// The rests of a chunk of a slice, by group: those of group g are [first[g], first[g + 1]). Codes are read 16 at a time.
template <int G>
struct PanelRests {
  alignas(64) std::byte codes[chunk_groups<G> * slice_tokens<G> + panel_tokens][G];
  float factors[chunk_groups<G> * slice_tokens<G>];
  std::uint8_t tokens[chunk_groups<G> * slice_tokens<G>];
  int first[chunk_groups<G> + 1];
};

// Sums of all pairs of a panel and a tile.
using Dots = std::int32_t[panel_tokens][tile_rows];

// A group's codes out of a row of x, whose pieces lie in two halves.
template <int G>
inline void copy_group(Pointer codes, Index group, std::byte* to) {
  for (Index at = group * (G / piece), end = at + G / piece; at < end; ++at, to += piece) {
    const Pointer from = codes + at / L * (L * piece) + at % L * 16;
    std::memcpy(to, from, 16);
    std::memcpy(to + 16, from + 16 * L, 16);
  }
}

template <int G>
[[gnu::noinline]] void fill_panels(const Int8Args& args, Index first, Index groups, Index begin, Index count,
                                   Panels<G>& panels) {
  const std::size_t bytes = static_cast<std::size_t>(groups) * sizeof(float);
  for (Index i = 0; i < count; ++i) {
    const Pointer x = token(args, begin + i);
    for (Index g = 0; g < groups; ++g) copy_group<G>(x, first + g, panels.codes[i / panel_tokens][g][i % panel_tokens]);
    std::memcpy(panels.factors[i], floats_at(x + args.factors) + first, bytes);
    std::memcpy(panels.sums[i], floats_at(x + args.sums) + first, bytes);
  }
  // What lies in the rows of a last panel that is not full is multiplied, and not used.
  for (Index i = count; i % panel_tokens != 0; ++i) {
    std::memset(panels.factors[i], 0, bytes);
    std::memset(panels.sums[i], 0, bytes);
  }
}

template <int G>
[[gnu::noinline]] void fill_rests(const Int8Args& args, Index first, Index groups, Index begin, Index count,
                                  PanelRests<G>& rests) {
  std::uint64_t masks[slice_tokens<G>];
  int counts[chunk_groups<G>] = {};
  for (Index i = 0; i < count; ++i) {
    const Pointer x[] = {token(args, begin + i)};
    masks[i] = with_rest<chunk_groups<G>>(args, x, first);
    for (std::uint64_t left = masks[i]; left != 0; left &= left - 1) ++counts[__builtin_ctzll(left)];
  }
  rests.first[0] = 0;
  for (Index g = 0; g < groups; ++g) rests.first[g + 1] = rests.first[g] + counts[g];
  if (rests.first[groups] == 0) return;
  int next[chunk_groups<G>];
  std::memcpy(next, rests.first, sizeof next);
  for (Index i = 0; i < count; ++i) {
    const Pointer x = token(args, begin + i);
    for (std::uint64_t left = masks[i]; left != 0; left &= left - 1) {
      const int g = __builtin_ctzll(left), to = next[g]++;
      copy_group<G>(x + args.rest, first + g, rests.codes[to]);
      rests.factors[to] = floats_at(x + args.rest_factors)[first + g];
      rests.tokens[to] = static_cast<std::uint8_t>(i);
    }
  }
}

inline Float converted(const std::int32_t* dots) {
  return V::convert(V::ints(V::load_bytes(reinterpret_cast<const std::byte*>(dots))));
}

template <int G>
inline const std::byte* group_codes(const Tile<G>& tile, Index g) {
  return tile.codes + g * (G / piece * piece_codes);
}

template <int G>
inline void begin_dots(const std::byte* x, const std::byte* w, Dots (&dots)[2], int set) {
  if (set == 0) dot<0, G>(x, w, dots[0][0]);
  else dot<1, G>(x, w, dots[1][0]);
}

// sums[token of the slice][partial sum] = what the rests of the chunk add.
template <int G>
void sum_rests(const Tile<G>& tile, Index groups, Index count, const PanelRests<G>& rests, Float (*sums)[L]) {
  for (Index i = 0; i < (count + panel_tokens - 1) / panel_tokens * panel_tokens; ++i)
    for (Float& sum : sums[i]) sum = V::floats(V::zero());
  struct Batch {
    Index group;
    int begin, end;
  };
  alignas(64) Dots dots[2];
  const auto end_batch = [&](Batch batch, int set) {
    const Float scale = V::load(tile.scales + batch.group * tile_rows);
    for (int i = batch.begin; i < batch.end; ++i) {
      Float& sum = sums[rests.tokens[i]][batch.group % L];
      sum = V::fma(V::mul(converted(dots[set][i - batch.begin]), V::set(rests.factors[i])), scale, sum);
    }
  };
  Batch before{};
  int set = 0;
  for (Index g = 0; g < groups; ++g) {
    for (int at = rests.first[g], end = rests.first[g + 1]; at < end; at += panel_tokens, set ^= 1) {
      begin_dots<G>(rests.codes[at], group_codes(tile, g), dots, set);
      end_batch(before, set ^ 1);
      before = {g, at, static_cast<int>(smaller(at + panel_tokens, end))};
    }
  }
  end_batch(before, set ^ 1);
}

// out[token][row] = tile by the first T tokens of panel p. rests: of its tokens.
template <int G, int T>
void multiply_panel(const Tile<G>& tile, const Panels<G>& panels, Index p, Index groups, const Float (*rests)[L],
                    Ahead ahead, Float (&out)[panel_tokens]) {
  alignas(64) Dots dots[2];
  const auto* factors = panels.factors + p * panel_tokens;
  const auto* x_sums = panels.sums + p * panel_tokens;
  for (Index q = 0; q < L; ++q) {
    Float sums[T];
    for (Float& sum : sums) sum = V::floats(V::zero());
    const auto begin_group = [&](Index g, int set) {
      if (g < groups) begin_dots<G>(panels.codes[p][g][0], group_codes(tile, g), dots, set);
    };
    const auto end_group = [&](Index g, int set) {
      if (g >= groups) return;
      const Float scale = V::load(tile.scales + g * tile_rows), bias = V::load(tile.biases + g * tile_rows);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        sums[t] = V::fma(V::mul(converted(dots[set][t]), V::set(factors[t][g])), scale, sums[t]);
        sums[t] = V::fma(bias, V::set(x_sums[t][g]), sums[t]);
      }
      for (Index line = 0; line < ahead.bytes; line += 64) __builtin_prefetch(ahead.from + g * ahead.bytes + line, 0, 2);
    };
    begin_group(q, 0);
    for (Index g = q; g < groups; g += 2 * L) {  // one group is multiplied while the one before is scaled
      begin_group(g + L, 1);
      end_group(g, 0);
      begin_group(g + 2 * L, 0);
      end_group(g + L, 1);
    }
    for (int t = 0; t < T; ++t) {
      const Float sum = V::add(sums[t], rests[t][q]);
      out[t] = q == 0 ? sum : V::add(out[t], sum);
    }
  }
}

// The same for `count` tokens, up to T.
template <int G, int T = panel_tokens>
void multiply_some(const Tile<G>& tile, const Panels<G>& panels, Index p, Index groups, Index count, const Float (*rests)[L],
                   Ahead ahead, Float (&out)[panel_tokens]) {
  if constexpr (T > 4) {
    if (count <= T - 4) return multiply_some<G, T - 4>(tile, panels, p, groups, count, rests, ahead, out);
  }
  multiply_panel<G, T>(tile, panels, p, groups, rests, ahead, out);
}

// Tokens [begin, begin + count).
template <int bits, int G>
void tmm_slice(const Int8Args& args, Index begin, Index count) {
  Panels<G> panels;
  PanelRests<G> rests;
  Tile<G> tile;
  Float rest_sums[slice_tokens<G>][L];
  for (Index first = 0; first < args.groups; first += chunk_groups<G>) {
    const Index groups = smaller(chunk_groups<G>, args.groups - first);
    fill_panels<G>(args, first, groups, begin, count, panels);
    fill_rests<G>(args, first, groups, begin, count, rests);
    for (Index row = args.row_begin; row < args.row_end; row += tile_rows) {
      Index rows[tile_rows];
      for (int r = 0; r < tile_rows; ++r) rows[r] = smaller(row + r, args.row_end - 1);
      fill<bits, G>(args, rows, first, groups, tile);
      __asm__ volatile("" ::: "memory");  // tile registers are loaded behind the compiler's back
      if (begin == 0 && first == 0) fetch_scales(args, row, tile_rows);
      constexpr Index of_tile = tile_rows * (G * bits / 8);  // bytes of a group
      Ahead ahead{ahead_of(args, args.weight + row * args.row_bytes + first * of_tile), of_tile};
      sum_rests<G>(tile, groups, count, rests, rest_sums);
      for (Index i = 0; i < count; i += panel_tokens, ahead.bytes = 0) {
        const Index present = smaller(panel_tokens, count - i);
        Float out[panel_tokens];
        multiply_some<G>(tile, panels, i / panel_tokens, groups, present, rest_sums + i, ahead, out);
        for (Index t = 0; t < present; ++t) store_sums(args, begin + i + t, row, first == 0, out[t]);
      }
    }
  }
}

template <int bits, int G>
void many(const Int8Args& args) {
  start<G>();
  const Index slices = (args.count + slice_tokens<G> - 1) / slice_tokens<G>;
  for (Index s = 0; s < slices; ++s) {
    const Index begin = args.count * s / slices;
    tmm_slice<bits, G>(args, begin, args.count * (s + 1) / slices - begin);
  }
  stop();
}

}  // namespace
}  // namespace mixbit
