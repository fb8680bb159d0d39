// Runs CUDA kernels on a CPU, one block after the other, for tests: the kernels' own source, compiled by a C++ compiler.
//
// Every thread of a block is a fiber. A fiber runs until it waits at a barrier or at a warp's vote; which fiber runs next is drawn by
// chance, so that what depends on the order of threads differs between seeds. A barrier that not all threads reach, a vote that not all
// lanes of a warp take part in, or that they take at different lines, ends the program with a message.
//
// Only what the kernels of this repository use is here.
#pragma once

#include <algorithm>
#include <array>
#include <csetjmp>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <ucontext.h>
#include <vector>

#define __global__
#define __noinline__
#define __device__
#define __host__
#define __shared__ static
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulation {

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;

enum State { READY, AT_BARRIER, AT_VOTE, DONE };

struct Fiber {
    ucontext_t context;
    std::jmp_buf place;
    State state = READY;
    bool started = false, predicate = false;
    int line = 0;
    unsigned ballot = 0, value = 0;
    std::array<unsigned, WARP> values;  // of all lanes, at a shuffle
    std::vector<char> stack;
};

inline std::vector<Fiber> fibers;
inline std::jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline int current = 0;
inline std::function<void()> kernel;
inline dim3 thread_index, block_index, grid_size, block_size;

[[noreturn]] inline void fail(const char* message, int line) {
    std::fprintf(stderr, "kernel: %s (line %d)\n", message, line);
    std::abort();
}

inline void wait(State state, int line) {
    Fiber& self = fibers[current];
    self.state = state, self.line = line;
    if (_setjmp(self.place) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
    kernel();
    fibers[current].state = DONE;
    _longjmp(scheduler, 1);
}

inline void resume(int i) {
    current = i;
    thread_index.x = static_cast<unsigned>(i);
    Fiber& fiber = fibers[i];
    fiber.state = READY;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    setcontext(&fiber.context);
}

// Give the votes of some of the warps whose lanes are all there, drawn by chance, so that warps get ahead of each other.
inline bool settle_votes(std::mt19937& chance) {
    std::vector<size_t> complete;
    for (size_t first = 0; first < fibers.size(); first += WARP) {
        int waiting = 0;
        for (int lane = 0; lane < WARP; ++lane) {
            Fiber& fiber = fibers[first + lane];
            if (fiber.state != AT_VOTE) continue;
            if (waiting++ && fiber.line != fibers[first].line) fail("lanes vote at different lines", fiber.line);
        }
        if (waiting == WARP) complete.push_back(first);
    }
    std::shuffle(complete.begin(), complete.end(), chance);
    complete.resize((complete.size() + 1) / 2);
    for (size_t first : complete) {
        unsigned ballot = 0;
        for (int lane = 0; lane < WARP; ++lane) ballot |= static_cast<unsigned>(fibers[first + lane].predicate) << lane;
        std::array<unsigned, WARP> values;
        for (int lane = 0; lane < WARP; ++lane) values[lane] = fibers[first + lane].value;
        for (int lane = 0; lane < WARP; ++lane) {
            Fiber& fiber = fibers[first + lane];
            fiber.ballot = ballot, fiber.values = values, fiber.state = READY;
        }
    }
    return !complete.empty();
}

inline void run_block(std::mt19937& chance) {
    for (Fiber& fiber : fibers) fiber.state = READY, fiber.started = false;
    std::vector<int> order;
    for (;;) {
        order.clear();
        for (size_t i = 0; i < fibers.size(); ++i)
            if (fibers[i].state == READY) order.push_back(static_cast<int>(i));
        if (order.empty()) {
            if (settle_votes(chance)) continue;
            int at_barrier = 0, at_vote = 0, line = 0;
            for (const Fiber& fiber : fibers) {
                at_barrier += fiber.state == AT_BARRIER, at_vote += fiber.state == AT_VOTE;
                if (fiber.state == AT_VOTE) line = fiber.line;
            }
            if (!at_barrier && !at_vote) return;
            if (at_vote) fail("a vote that not all lanes of the warp take part in", line);
            if (at_barrier < static_cast<int>(fibers.size())) fail("a barrier that not all threads reach", fibers[0].line);
            unsigned any = 0;
            for (const Fiber& fiber : fibers) any |= fiber.predicate;
            for (Fiber& fiber : fibers) {
                if (fiber.line != fibers[0].line) fail("threads wait at different barriers", fiber.line);
                fiber.state = READY, fiber.ballot = any;
            }
            continue;
        }
        std::shuffle(order.begin(), order.end(), chance);
        for (int i : order) resume(i);
    }
}

// Run `body` as a kernel: every block of the grid, in an order drawn by chance.
inline void launch(dim3 grid, unsigned threads, unsigned seed, std::function<void()> body) {
    if (fibers.size() != threads) {
        fibers = std::vector<Fiber>(threads);
        for (Fiber& fiber : fibers) fiber.stack.resize(STACK);
    }
    kernel = std::move(body);
    grid_size = grid, block_size = {threads, 1, 1};
    std::mt19937 chance(seed);
    std::vector<unsigned> blocks(grid.x * grid.y);
    for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), chance);
    for (unsigned block : blocks) {
        block_index = {block % grid.x, block / grid.x, 1};
        run_block(chance);
    }
}

inline unsigned vote(unsigned mask, bool predicate, int line) {
    if (mask != 0xffffffffu) fail("a vote of some lanes only", line);
    fibers[current].predicate = predicate;
    wait(AT_VOTE, line);
    return fibers[current].ballot;
}

inline int barrier(bool predicate, int line) {
    fibers[current].predicate = predicate;
    wait(AT_BARRIER, line);
    return fibers[current].ballot != 0;
}

// The value of lane `from`, for each lane its own choice.
template <typename T>
inline T shuffle(unsigned mask, T value, int from, int line) {
    static_assert(sizeof(T) == sizeof(unsigned), "a shuffle moves 32 bits");
    std::memcpy(&fibers[current].value, &value, sizeof value);
    vote(mask, false, line);
    if (from < 0 || from >= WARP) return value;
    std::memcpy(&value, &fibers[current].values[from], sizeof value);
    return value;
}

inline int lane() {
    return current % WARP;
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size
#define blockDim emulation::block_size
#define __syncthreads() static_cast<void>(emulation::barrier(false, __LINE__))
#define __syncthreads_or(predicate) emulation::barrier(predicate, __LINE__)
#define __syncwarp() static_cast<void>(emulation::vote(0xffffffffu, false, __LINE__))
#define __ballot_sync(mask, predicate) emulation::vote(mask, predicate, __LINE__)
#define __any_sync(mask, predicate) (emulation::vote(mask, predicate, __LINE__) != 0)
#define __shfl_sync(mask, value, from) emulation::shuffle(mask, value, from, __LINE__)
#define __shfl_up_sync(mask, value, step) emulation::shuffle(mask, value, emulation::lane() - (step), __LINE__)
#define __shfl_xor_sync(mask, value, step) emulation::shuffle(mask, value, emulation::lane() ^ (step), __LINE__)

inline int atomicAdd(int* at, int value) {
    const int before = *at;
    *at += value;
    return before;
}

inline unsigned atomicOr(unsigned* at, unsigned value) {
    const unsigned before = *at;
    *at |= value;
    return before;
}

inline unsigned atomicMax(unsigned* at, unsigned value) {
    const unsigned before = *at;
    *at = std::max(before, value);
    return before;
}

inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}

inline int __ffs(int x) {
    return __builtin_ffs(x);
}

template <typename To, typename From>
inline To same_bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float __int_as_float(int x) {
    return same_bits<float>(x);
}

inline float __uint_as_float(unsigned x) {
    return same_bits<float>(x);
}

inline unsigned __float_as_uint(float x) {
    return same_bits<unsigned>(x);
}

inline float half_to_float(unsigned short bits) {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
    if (exponent == 31) return same_bits<float>(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return same_bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    const float small = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -small : small;
}
