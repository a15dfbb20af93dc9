// Runs the kernels for NF4 weights without a GPU: a thread of the processor for each of a block's, one block after the other.
//
// What ptx.cuh says in PTX is said here in C++. Copies to shared memory are done when they are waited for, not before, so that a
// missing wait is seen; shared memory begins as NaN. Products are those of mma.m16n8k16 (PTX ISA 8.5, 9.7.14.5.8).

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

using std::min;
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Index3 { unsigned x, y, z; };
uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

thread_local Index3 threadIdx, blockIdx;
Index3 blockDim = {256, 1, 1};
uint4 memory[1 << 14];

struct Warp {
    std::barrier<> all{32};
    unsigned words[32][6];
};
Warp warps[8];
std::barrier<> block{256};
Warp& own_warp() { return warps[threadIdx.x / 32]; }
void __syncthreads() { block.arrive_and_wait(); }
void __syncwarp() { own_warp().all.arrive_and_wait(); }

template <class T> T __ldg(const T* from) { return *from; }
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> T read_lane(T value, int lane) {
    Warp& warp = own_warp();
    std::memcpy(warp.words[threadIdx.x % 32], &value, 4);
    warp.all.arrive_and_wait();
    T found;
    std::memcpy(&found, warp.words[lane], 4);
    warp.all.arrive_and_wait();
    return found;
}
template <class T> T __shfl_sync(unsigned, T value, int lane) { return read_lane(value, lane); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return read_lane(value, threadIdx.x % 32 ^ mask); }
float __fmul_rn(float x, float y) { return x * y; }
float __fadd_rn(float x, float y) { return x + y; }
float exp_of(float x) { return std::exp(x); }

typedef unsigned short bf16;
float to_float(bf16 value) {
    const unsigned bits = static_cast<unsigned>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
bf16 to_bf16(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
unsigned round_two(float low, float high) { return to_bf16(low) | static_cast<unsigned>(to_bf16(high)) << 16; }

struct Copy {
    void* to;
    const void* from;
    bool is_there;
};
thread_local std::vector<Copy> copies;
void copy_16_bytes(void* to, const void* from, bool is_there) { copies.push_back({to, from, is_there}); }
void end_copies() {}
void wait_for_copies() {
    for (const Copy& copy : copies)
        if (copy.is_there) std::memcpy(copy.to, copy.from, 16);
        else std::memset(copy.to, 0, 16);
    copies.clear();
}
void let_next_kernel_begin() {}
void wait_for_kernel_before() {}

void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    Warp& warp = own_warp();
    const int lane = threadIdx.x % 32;
    unsigned(&own)[6] = warp.words[lane];
    std::copy(a, a + 4, own), own[4] = b0, own[5] = b1;
    warp.all.arrive_and_wait();
    for (int index = 0; index < 4; index++)
        for (int quad = 0; quad < 4; quad++)
            for (int half = 0; half < 2; half++) {
                const unsigned x = warp.words[lane / 4 * 4 + quad][(index >> 1) + 2 * half];
                const unsigned y = warp.words[(lane % 4 * 2 + (index & 1)) * 4 + quad][4 + half];
                sums[index] += to_float(x) * to_float(y) + to_float(x >> 16) * to_float(y >> 16);
            }
    warp.all.arrive_and_wait();
}

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __expf exp_of
#include "nf4_tiles.cuh"
#define __shared__
#include "few_nf4.cu"
#undef __shared__
#define __shared__ static
#include "unpack_nf4.cu"

template <class Kernel> void launch(unsigned columns, unsigned rows, Kernel kernel) {
    for (unsigned row = 0; row < rows; row++)
        for (unsigned column = 0; column < columns; column++) {
            std::memset(memory, 0xff, sizeof(memory));
            std::vector<std::thread> threads;
            for (unsigned index = 0; index < 256; index++)
                threads.emplace_back([=] {
                    threadIdx = {index, 0, 0}, blockIdx = {column, row, 0};
                    kernel();
                });
            for (std::thread& thread : threads) thread.join();
        }
}

// As finlora/model/kernels/nf4_products.py launches them: the grid, then the kernel's own arguments.
extern "C" void launch_few_nf4(int blocks, int, const bf16* x, const unsigned char* tiles, const float* level_code,
                               const float* level_scales, const float* means, const unsigned* pairs, float* parts, int num_rows,
                               int num_out, int num_in, int steps, int steps_a_block) {
    launch(blocks, 1, [=] {
        few_nf4(x, tiles, level_code, level_scales, means, pairs, parts, num_rows, num_out, num_in, steps, steps_a_block);
    });
}

extern "C" void launch_add_parts(int columns, int rows, const float* parts, const bf16* residual, bf16* target, int num_rows,
                                 int num_out, int num_columns, int steps_a_block) {
    launch(columns, rows, [=] { add_parts(parts, residual, target, num_rows, num_out, num_columns, steps_a_block); });
}

extern "C" void launch_add_gated_parts(int columns, int rows, const float* parts, bf16* target, int num_rows, int num_out,
                                       int num_columns, int steps_a_block) {
    launch(columns, rows, [=] { add_gated_parts(parts, target, num_rows, num_out, num_columns, steps_a_block); });
}

extern "C" void launch_unpack_nf4(int columns, int rows, const unsigned char* tiles, const float* level_code,
                                  const float* level_scales, const float* means, const float* code, bf16* target, int num_out,
                                  int num_in) {
    launch(columns, rows, [=] { unpack_nf4(tiles, level_code, level_scales, means, code, target, num_out, num_in); });
}
