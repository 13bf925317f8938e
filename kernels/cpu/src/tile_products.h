// Two by two products on tile registers, over `Registers` (see tile_registers.h): registers 0 to 3 have the sums of
// register 4 by 6, 4 by 7, 5 by 6 and 5 by 7.
#pragma once

namespace mixbit {
namespace {

template <int lefts, int rights, class R = Registers>
inline void zero_sums() {
  R::template zero<0>();
  if constexpr (rights == 2) R::template zero<1>();
  if constexpr (lefts == 2) R::template zero<2>();
  if constexpr (lefts == 2 && rights == 2) R::template zero<3>();
}

template <int lefts, int rights, class R = Registers>
inline void dot_all() {
  R::template dot<0, 4, 6>();
  if constexpr (rights == 2) R::template dot<1, 4, 7>();
  if constexpr (lefts == 2) R::template dot<2, 5, 6>();
  if constexpr (lefts == 2 && rights == 2) R::template dot<3, 5, 7>();
}

}  // namespace
}  // namespace mixbit
