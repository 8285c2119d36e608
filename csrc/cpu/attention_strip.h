// A strip of query rows as lanes: which rows they are, and which keys of a tile each of them sees.
#pragma once
#include "cpu/attention_memory.h"

PYKERN_BEGIN_ISA
namespace {

// Without fma, multiply_tile() sums in runs of 16 units, which must begin where they always do.
constexpr int kFirstStep = kFused ? kKeyRows : 32;

// A strip of rows: what its lanes are, and its words. Few rows fill its last vectors: lanes before
// lane0 are idle, and their vectors left out.
template <class T>
struct Strip {
  using C = Compute<T>;
  using V = Vec<C>;
  using Bits = typename Registers<C>::Bits;
  using Bit = typename Registers<C>::Bit;
  static constexpr int L = V::lanes, Q = kStripVectors * L, parts = kKeys / (8 * sizeof(C));
  int64_t h[Q], t[Q];
  alignas(64) C diagonal[Q], slope[Q];
  alignas(64) Bit seen[parts][Q], keep[parts][Q];
  int rows, lane0;
  int64_t first_key, end_key;     // of all that some row may see
  int64_t whole_from, whole_to;   // keys that every row sees, but for the mask
  int begin, end[kStripVectors];  // of the tile, that a vector and those before it may see
  bool partial;                   // some row does not see all of the tile
  int last() const { return end[kStripVectors - 1]; }
  int idle() const { return lane0 / L; }  // vectors
  bool live(int i) const { return i >= lane0 && i < lane0 + rows; }

  // yes where the lane's word has the key's bit, else no
  static V select(const Bit (&words)[parts][Q], int key, int vector, V yes, V no) {
    Bits lanes;
    memcpy(&lanes, words[key / (8 * sizeof(C))] + vector * L, sizeof lanes);
    return select_where<C>(lanes, Bits{} + (Bit(1) << key % (8 * sizeof(C))), yes, no);
  }
};

template <class T>
static void place_strip(const Group<T>& x, int64_t r0, int64_t r1, Strip<T>& strip) {
  using C = Compute<T>;
  strip.rows = static_cast<int>(r1 - r0 < strip.Q ? r1 - r0 : strip.Q);
  strip.first_key = strip.whole_to = x.S, strip.end_key = strip.whole_from = 0;
  int64_t h = r0 / x.T_, t = r0 % x.T_;
  strip.lane0 = strip.Q - (strip.rows + strip.L - 1) / strip.L * strip.L;
  for (int i = strip.lane0; i < strip.Q; ++i) {  // lanes without a row repeat the last one
    strip.h[i] = h, strip.t[i] = t;
    strip.diagonal[i] = static_cast<C>(x.diagonal(t));
    strip.slope[i] = -x.slope(h);
    const int64_t first = x.first_key(t), end = x.end_key(t);
    strip.first_key = first < strip.first_key ? first : strip.first_key;
    strip.whole_from = first > strip.whole_from ? first : strip.whole_from;
    strip.end_key = end > strip.end_key ? end : strip.end_key;
    strip.whole_to = end < strip.whole_to ? end : strip.whole_to;
    if (!strip.live(i + 1)) continue;
    if (++t == x.T_) ++h, t = 0;
  }
}

template <class T>
static void put_word(typename Strip<T>::Bit (&words)[Strip<T>::parts][Strip<T>::Q], int i,
                     uint64_t word) {
  for (int part = 0; part < Strip<T>::parts; ++part)
    words[part][i] =
        static_cast<typename Strip<T>::Bit>(word >> part * 8 * sizeof(Compute<T>) % 64);
}

// Fills in what the strip sees of the tile at `first`; false when that is nothing.
template <class T>
static bool look(const Group<T>& x, int64_t first, Strip<T>& strip) {
  constexpr int L = Strip<T>::L;
  if (first >= strip.end_key || first + kKeys <= strip.first_key) return false;
  if (x.dropout.threshold != 0)
    for (int i = strip.lane0; strip.live(i); ++i)
      put_word<T>(strip.keep, i, kept(x, strip.h[i], strip.t[i], first));
  strip.partial = x.mask || x.bias || first < strip.whole_from || first + kKeys > strip.whole_to;
  if (!strip.partial) {
    strip.begin = 0;
    for (int j = 0; j < kStripVectors; ++j) strip.end[j] = j < strip.idle() ? 0 : kKeys;
    return true;
  }
  uint64_t any = 0, all = ~uint64_t(0);
  for (int j = 0; j < strip.idle(); ++j) strip.end[j] = 0;
  for (int j = strip.idle(); j < kStripVectors; ++j) {
    for (int i = j * L; i < (j + 1) * L; ++i) {
      const uint64_t word = strip.live(i) ? visible(x, strip.h[i], strip.t[i], first) : 0;
      put_word<T>(strip.seen, i, word);
      any |= word;
      if (strip.live(i)) all &= word;
    }
    strip.end[j] = any == 0 ? 0 : 64 - __builtin_clzll(any);
  }
  if (any == 0) return false;
  if constexpr (!kFused)  // the runs of multiply_tile must not be cut
    for (int j = strip.idle(); j < kStripVectors; ++j) strip.end[j] = strip.last();
  strip.partial = all != ~uint64_t(0);
  strip.begin = __builtin_ctzll(any) / kFirstStep * kFirstStep;
  return true;
}

// bias of the tile as [key][query]; a bias of -inf hides its key.
template <class T>
static void bias_columns(const Group<T>& x, int64_t first, int keys, Strip<T>& strip,
                         Compute<T>* out) {
  using C = Compute<T>;
  constexpr int Q = Strip<T>::Q;
  for (int i = strip.lane0; strip.live(i); ++i) {
    const T* row = x.bias + strip.h[i] * x.bias_head + strip.t[i] * x.bias_row + first * x.bias_key;
    uint64_t hidden = 0;
    for (int key = 0; key < keys; ++key) {
      const C b = widen(row[key * x.bias_key]);
      out[key * Q + i] = b;
      hidden |= static_cast<uint64_t>(b == C(-INFINITY)) << key;
    }
    if (hidden == 0) continue;
    strip.partial = true;
    for (int part = 0; part < Strip<T>::parts; ++part)
      strip.seen[part][i] &=
          ~static_cast<typename Strip<T>::Bit>(hidden >> part * 8 * sizeof(C) % 64);
  }
}

}  // namespace
PYKERN_END_ISA
