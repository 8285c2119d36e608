// Backward attention of halves, five products in one pass: a block owns kN keys of a key head and
// walks over tiles of 64 queries of the heads that read it, a warp owns 16 of the keys.
//   s^T = k q^T   dp^T = v dout^T   p = 2^(s - lse)   ds = p (dp - delta)      in registers
//   dv += p^T dout   dk += ds^T q                                             in registers
//   dq += ds k                                                                in global memory
// dq adds up in float, in the order of the keys: a block adds to a tile of queries when the last
// block before it that sees the tile has. Blocks take tickets, so whoever is waited for runs
// already. Its numbers lie in the order in which threads hold them (finish_dq unravels it).
//
// Bound, per tile of 64 queries by kN keys: 10 x 64 x kN x D products on tensor cores (mma.sync:
// 0.62 of Hopper's rate), and half as long again for what shared memory moves: an ldmatrix for two
// mma.
#pragma once
#include "cuda/attention_backward_tiles.cuh"

namespace pykern::cuda {

template <class T, int kD, int kN, bool kPlain>
__global__ void __launch_bounds__(BackwardTiles<T, kD, kN>::kThreads, 1)
    attention_backward_halves(const BackwardHalves<T> a) {
  using Tiles = BackwardTiles<T, kD, kN>;
  using Stage = typename Tiles::Stage;
  constexpr int kThreads = Tiles::kThreads, kStages = Tiles::kStages, kOwn = Tiles::kOwn;
  constexpr int kWide = kM / 8;
  auto& shared = shared_memory<Tiles>();
  const Scores<T>& x = a.scores;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  BackwardPlan& plan = shared.plan;
  if (threadIdx.x < kN / 32) shared.strange_keys[threadIdx.x] = 0;
  if (threadIdx.x < kM / 32)
    shared.strange_queries[threadIdx.x] = shared.strange_dout[threadIdx.x] = 0;
  if (warp == 0) {
    const uint32_t own = lane == 0 ? atomicAdd(a.tickets, 1u) : 0;
    const int ticket = static_cast<int>(__shfl_sync(kAllLanes, own, 0));
    const int heads = x.H / x.group, rest = ticket / heads;
    BlockPlace mine{rest % x.sequences, rest / x.sequences * kN};
    if (x.cu_k) mine = ragged_block<kN>(x.cu_k, x.cu_k_step, x.sequences, x.keys, rest);
    if (lane == 0) {
      plan.b = mine.sequence, plan.first = mine.first, plan.g = ticket % heads;
      if (plan.b >= 0) {
        const Place at = x.place(plan.b);
        plan.at = at;
        plan.last = (plan.first + kN < at.keys ? plan.first + kN : at.keys) - 1;
        plan.begin = x.first_query(at, plan.first) / kM;
        plan.end = at.queries > 0 ? (x.end_query(at, plan.last) + kM - 1) / kM : 0;
        plan.next_h = plan.g * x.group, plan.next_m = plan.begin, plan.tile = -1;
        plan.strange_dout = false;
      }
    }
  }
  __syncthreads();
  if (plan.b < 0) return;

  const auto look = [&](int h, int m, int from) {  // at keys [from, from + kN)
    const int t0 = m * kM, t1 = t0 + kM < plan.at.queries ? t0 + kM - 1 : plan.at.queries - 1;
    int classes = 0;
    for (int i = 0; i < kN / kKeys; ++i)
      classes |= x.look(plan.at, plan.b, h, t0, t1, from / kKeys + i);
    return classes;
  };
  const auto seek = [&](int h, int m) {  // one thread: from tile m of head h on
    for (; h < (plan.g + 1) * x.group; ++h, m = plan.begin)
      for (; m < plan.end; ++m)
        if (const int found = look(h, m, plan.first); found & kSeen) {
          plan.next_h = h, plan.next_m = m, plan.next_found = found;
          return;
        }
    plan.next_h = h;
  };
  const auto begin_next = [&] {  // one thread
    plan.h = plan.next_h, plan.m = plan.next_m, plan.found = plan.next_found;
  };
  const auto there = [&] { return plan.next_h < (plan.g + 1) * x.group; };

  const auto fetch_queries = [&](Stage& to) {
    const Place& at = plan.at;
    const int h = plan.next_h, first = plan.next_m * kM;
    Fetch<T, Tile<T, kM, kD>, kThreads>(a.rows.q.at(at.batch, h, at.q_row), a.rows.q.row, x.D,
                                        a.q_words)(to.q, first, at.queries);
    Fetch<T, Tile<T, kM, kD>, kThreads>(a.rows.dout.at(at.batch, h, at.q_row), a.rows.dout.row, x.E,
                                        a.dout_words)(to.dout, first, at.queries);
    cp_async_commit();
    const int t = first + threadIdx.x % kM;
    if (threadIdx.x < kM) {
      float shift = INFINITY, delta = 0;  // a query that is not there has no weights
      if (t < at.queries) {
        const auto& row = a.facts[(int64_t{at.batch} * x.H + h) * x.queries + at.q_row + t];
        shift = row.shift, delta = row.delta;
      }
      to.shift[threadIdx.x] = shift, to.delta[threadIdx.x] = delta;
    }
    if (plan.next_found & kHidden)
      for (int i = threadIdx.x; i < kN / kKeys * kM; i += kThreads)
        to.words[i / kM][i % kM] = x.visible(at, plan.b, h, t, plan.first / kKeys + i / kM);
  };

  if (threadIdx.x == 0) seek(plan.next_h, plan.next_m);
  {
    const Place& at = plan.at;
    Fetch<T, Tile<T, kN, kD>, kThreads>(a.rows.k.at(at.batch, plan.g, at.k_row), a.rows.k.row, x.D,
                                        a.k_words)(shared.k, plan.first, plan.last + 1);
    Fetch<T, Tile<T, kN, kD>, kThreads>(a.rows.v.at(at.batch, plan.g, at.k_row), a.rows.v.row, x.E,
                                        a.v_words)(shared.v, plan.first, plan.last + 1);
  }
  cp_async_commit();
  __syncthreads();  // who is next is known
  if (there()) fetch_queries(shared.stage[0]);
  if (threadIdx.x == 0) begin_next();
  cp_async_wait<0>();
  __syncthreads();
  find_strange<kThreads>(shared.k, shared.strange_keys);
  __syncthreads();
  {
    uint32_t some = 0;
    for (const uint32_t word : shared.strange_keys) some |= word;
    if (threadIdx.x == 0) plan.strange_keys = some != 0;
    if (some != 0) replace_strange<kThreads>(shared.k);
  }

  const int key16 = warp % Tiles::kKeyWarps * 16, split = warp / Tiles::kKeyWarps;
  const int my_key = key16 + lane / 4;  // and the eighth behind it
  float dk[kOwn / 8][4] = {}, dv[kOwn / 8][4] = {};

#pragma unroll 1
  for (int turn = 0; there(); turn = (turn + 1) % kStages) {
    Stage& now = shared.stage[turn];
    cp_async_wait<0>();
    __syncthreads();  // the queries are there; those before, and ds, have been read
    if (threadIdx.x == 0) {
      if (plan.tile >= 0) store_release(a.turns + plan.tile, plan.first / kN + 1u);
      seek(plan.h, plan.m + 1);
    }
    const bool partial = (plan.found & kHidden) != 0;
    const auto t0 = [&] { return plan.m * kM; };

    bool strange = plan.strange_keys;
    if (partial) {
      find_strange<kThreads>(now.q, shared.strange_queries);
      find_strange<kThreads>(now.dout, shared.strange_dout);
      __syncthreads();
      if ((shared.strange_queries[0] | shared.strange_queries[1]) != 0) {
        strange = true;
        replace_strange<kThreads>(now.q);
      }
      if ((shared.strange_dout[0] | shared.strange_dout[1]) != 0) {
        replace_strange<kThreads>(now.dout);
        if (threadIdx.x == 0) plan.strange_dout = true;
      }
    }

    // Products with the transposed: piece n, number i is key my_key + 8 (i / 2), query
    // 8 n + 2 (lane % 4) + i % 2.
    const auto multiply_rows = [&](const Tile<T, kN, kD>& left, const Tile<T, kM, kD>& right,
                                   float (&to)[kWide][4]) {
      const LaneRows<true, kD> down;
      const LaneRows<false, kD> across;
      [[maybe_unused]] constexpr int kSteps = kD > 64 ? 4 : kD / 16;  // at once: registers
#pragma unroll kSteps
      for (int d = 0; d < kD / 16; ++d) {
        uint32_t l[4], r[4];
        ldmatrix_x4(l, down(left.of, key16, d));
#pragma unroll
        for (int n = 0; n < kM / 16; ++n) {
          ldmatrix_x4(r, across(right.of, 16 * n, d));
          multiply(to[2 * n], l, r[0], r[1], T{});
          multiply(to[2 * n + 1], l, r[2], r[3], T{});
        }
      }
    };
    const auto each = [&](const auto& body) {  // body(n, i, query)
#pragma unroll
      for (int n = 0; n < kWide; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) body(n, i, 8 * n + lane % 4 * 2 + i % 2);
    };
    const auto key_of = [&](int i) { return plan.first + my_key + i / 2 * 8; };
    const auto sees = [&](int i, int query) {  // by window and mask
      return !partial || (now.words[key16 / kKeys][query] >> (my_key % kKeys + i / 2 * 8) & 1) != 0;
    };

    uint32_t p[kM / 16][4];  // the weights, as a left factor over the queries
    [[maybe_unused]] uint32_t cap_slope[kM / 16][4];
    [[maybe_unused]] uint32_t keep = ~0u;  // what dropout keeps: bit 4 n + i
    const float grown = static_cast<float>(x.dropout.factor);
    {
      float s[kWide][4] = {};
      multiply_rows(shared.k, now.q, s);
      if constexpr (!kPlain) {
        each([&](int n, int i, int) { s[n][i] *= x.scale; });
        if (x.cap != 0) {
          float slope[kWide][4];
          each([&](int n, int i, int) {
            const float t = hyperbolic_tangent_for<T>(s[n][i]);
            s[n][i] = x.cap * t, slope[n][i] = 1 - t * t;
          });
          left_factors<T, kM / 16>(slope, cap_slope);
        }
        if (x.slopes) {
          const float slope = -x.slope(plan.b, plan.h);
          each([&](int n, int i, int query) {
            s[n][i] =
                fmaf(slope, fabsf(float(plan.at.diagonal(t0() + query) - key_of(i))), s[n][i]);
          });
        }
        if (x.bias.data)
          each([&](int n, int i, int query) {
            if (!sees(i, query) || t0() + query >= plan.at.queries) return;
            const float bias =
                widen(x.bias.at(plan.b, plan.h, t0() + query)[key_of(i) * x.bias_key]);
            s[n][i] =
                bias == -INFINITY ? bias : fmaf(least_bias(bias), float(kBitsPerNat), s[n][i]);
          });
      }
      const float factor = kPlain ? x.scale : 1.0f;
      each([&](int n, int i, int query) {
        s[n][i] = exp2_approx(fmaf(s[n][i], factor, -now.shift[query]));
      });
      if (partial)
        each([&](int n, int i, int query) { s[n][i] = sees(i, query) ? s[n][i] : 0.0f; });
      if (strange)  // rare: who sees such a number has no gradient
        each([&](int n, int i, int query) {
          const int key = my_key + i / 2 * 8;
          const bool odd = (shared.strange_keys[key / 32] >> key % 32 & 1) != 0 ||
                           (shared.strange_queries[query / 32] >> query % 32 & 1) != 0;
          const int t = t0() + query;
          if (odd && t < plan.at.queries && sees(i, query) &&
              unbiased(x, plan.b, plan.h, t, key_of(i)))
            s[n][i] = NAN;
        });
      left_factors<T, kM / 16>(s, p);
    }

    const auto accumulate = [&](const uint32_t (&left)[kM / 16][4], const Tile<T, kM, kD>& right,
                                float (&to)[kOwn / 8][4]) {
      const LaneRows<true, kD> down;
#pragma unroll
      for (int query = 0; query < kM / 16; ++query)
#pragma unroll
        for (int e = 0; e < kOwn / 16; ++e) {
          uint32_t r[4];
          ldmatrix_x4_trans(r, down(right.of, 16 * query, split * (kOwn / 16) + e));
          multiply(to[2 * e], left[query], r[0], r[1], T{});
          multiply(to[2 * e + 1], left[query], r[2], r[3], T{});
        }
    };
    bool dropped = false;
    if constexpr (!kPlain) {
      dropped = x.dropout.threshold != 0;
      if (dropped) {
        const uint64_t seed = static_cast<uint64_t>(*x.dropout.seed);
        keep = 0;
#pragma unroll 1
        for (int j = 0; j < 4 * kWide; ++j) {
          const int key = key_of(j % 4), t = t0() + j / 4 * 8 + lane % 4 * 2 + j % 2;
          const uint32_t bits =
              keep_bits(x.dropout, seed, plan.b, plan.h, t, key / kKeys, key % 16);
          keep |= (bits >> key % kKeys / 16 & 1) << j;
        }
        float kept_p[kWide][4];
        uint32_t left[kM / 16][4];
        each([&](int n, int i, int) {
          kept_p[n][i] = keep >> (4 * n + i) & 1 ? number_of<T>(p, n, i) * grown : 0.0f;
        });
        left_factors<T, kM / 16>(kept_p, left);
        accumulate(left, now.dout, dv);
      }
    }
    if (!dropped) accumulate(p, now.dout, dv);

    uint32_t ds[kM / 16][4];
    {
      float dp[kWide][4] = {};
      multiply_rows(shared.v, now.dout, dp);
      if constexpr (!kPlain) {
        if (dropped)
          each([&](int n, int i, int) {
            dp[n][i] = keep >> (4 * n + i) & 1 ? dp[n][i] * grown : 0.0f;
          });
      }
      each([&](int n, int i, int query) {
        dp[n][i] = number_of<T>(p, n, i) * (dp[n][i] - now.delta[query]);
      });
      if constexpr (!kPlain) {
        if (x.cap != 0) each([&](int n, int i, int) { dp[n][i] *= number_of<T>(cap_slope, n, i); });
      }
      if (partial || !kPlain)  // hidden, or as good as hidden: whatever dp is
        each([&](int n, int i, int) { dp[n][i] = number_of<T>(p, n, i) == 0 ? 0.0f : dp[n][i]; });
      left_factors<T, kM / 16>(dp, ds);
    }
    if (split == 0) {
      const int key = kept(my_key);
#pragma unroll
      for (int n = 0; n < kWide; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(shared.ds.chunk(key + 8 * half, n) + lane % 4 * 2) =
              ds[n / 2][n % 2 * 2 + half];
    }
    if (threadIdx.x == 0) {
      plan.tile = a.tile(plan.at, plan.b, plan.h, t0());
      int before = plan.first - kN;  // the keys of the last block before this one that has added
      while (before >= 0 && !(look(plan.h, plan.m, before) & kSeen)) before -= kN;
      if (before >= 0) await_value(a.turns + plan.tile, before / kN + 1u);
      plan.others = before >= 0;
    }
    __syncthreads();  // ds is there, it is this block's turn, and who is next is known
    if (threadIdx.x == 0) begin_next();
    if (kStages > 1 && there()) fetch_queries(shared.stage[(turn + 1) % kStages]);
    accumulate(ds, now.q, dk);

    // dq: 32 queries by kDqColumns a warp, as many columns at a time as registers are left for
    constexpr int kAtOnce = Tiles::kDqColumns < 32 ? Tiles::kDqColumns : 32;
    const int rows = warp % 2 * 32;
#pragma unroll 1
    for (int column = 0; column < Tiles::kDqColumns; column += kAtOnce) {
      const LaneRows<false, kM> across;
      const LaneRows<true, kD> down;
      const int columns = warp / 2 * Tiles::kDqColumns + column;
      float dq[2][kAtOnce / 8][4] = {};
#pragma unroll
      for (int key = 0; key < kN; key += 16) {
        uint32_t l[2][4], r[4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          ldmatrix_x4_trans(l[i], across(shared.ds.of, key, rows / 16 + i));
#pragma unroll
        for (int c = 0; c < kAtOnce / 16; ++c) {
          ldmatrix_x4_trans(r, down(shared.k.of, key, columns / 16 + c));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply(dq[i][2 * c], l[i], r[0], r[1], T{});
            multiply(dq[i][2 * c + 1], l[i], r[2], r[3], T{});
          }
        }
      }
      const bool others = plan.others;
      float* sums =
          a.sums + int64_t{plan.tile} * (kM * kD) + column / 8 * 4 * kThreads + threadIdx.x;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int c = 0; c < kAtOnce / 8; ++c)
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            float* to = sums + ((i * Tiles::kDqPieces + c) * 4 + r) * kThreads;
            if (others)
              atomicAdd(to, dq[i][c][r]);  // in its turn, so in order; without waiting for the sum
            else
              *to = dq[i][c][r];
          }
    }
    if (partial && threadIdx.x < kM / 32)  // they have been read before ds was there
      shared.strange_queries[threadIdx.x] = shared.strange_dout[threadIdx.x] = 0;
    if (kStages == 1) {
      __syncthreads();  // the queries have been read
      if (there()) fetch_queries(shared.stage[0]);
    }
  }

  cp_async_wait<0>();
  __syncthreads();  // all have read the keys, and added
  if (threadIdx.x == 0 && plan.tile >= 0) store_release(a.turns + plan.tile, plan.first / kN + 1u);
  const auto put = [&](float (&sum)[kOwn / 8][4], float scale, Tile<T, kN, kD>& to) {
#pragma unroll
    for (int e = 0; e < kOwn / 8; ++e)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(to.chunk(my_key + 8 * half, split * (kOwn / 8) + e) +
                                     lane % 4 * 2) =
            rounded_pair<T>(sum[e][2 * half] * scale, sum[e][2 * half + 1] * scale);
  };
  put(dk, a.scale, shared.k);
  put(dv, 1, shared.v);
  __syncthreads();
  const auto write = [&](Tile<T, kN, kD>& from, const HeadRows<T>& to, int width, bool words) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kN * (kD / kChunk); i += kThreads) {
      const int row = i / (kD / kChunk), c = i % (kD / kChunk), valid = width - c * kChunk;
      if (plan.first + row > plan.last || valid <= 0) continue;
      float v[kChunk];
      load(from.chunk(row, c), kChunk, true, v);
      store(to.at(plan.at.batch, plan.g, plan.at.k_row + plan.first + row) + c * kChunk, valid,
            words, v);
    }
  };
  write(shared.k, a.rows.dk, x.D, a.dk_words);
  write(shared.v, a.rows.dv, x.E, a.dv_words);
  if (!plan.strange_dout) return;
  __syncthreads();
#pragma unroll 1
  for (int key = plan.first + warp; key <= plan.last; key += Tiles::kWarps)
    restore_strange_dout(a, plan, key);
}

}  // namespace pykern::cuda
