// x W^T for few rows of x, W unpacked from NF4 with double quantisation on the way; finlora/model/few_nf4.py launches it.
//
// Shapes: T rows, K in, N out. W is read once; what it costs besides should hide behind that. A byte holds two numbers, so a table
// of 256 pairs of bfloat16 gives both by one read of shared memory, a copy of the table for each lane of a warp: lanes that read
// different entries of one table would wait for each other. A group of 64 columns shares a scale, which is multiplied into the
// group's sums in float32.
//
// A tile is TILE outputs, a step STEP columns of one: of these a warp takes one slice for its outputs. Slices side by side make
// whole lines of memory, which are read in half the time of half ones. Blocks take equally many steps, one after the other along
// a tile and on into the next; what a block has of a tile goes to a place of its own for each slice, and add_parts sums these in
// a fixed order. A step's columns are on their way from memory while those of the one before are computed.
//
// Defined when this is compiled: WARPS of a block, SLICES that they take side by side, OUT_TILES of 16 outputs for each, ROW_TILES
// of 8 rows, BLOCKS of a processor, WORDS of four levels that are loaded at once, and whether it FETCHES_LINES that are read by half.

constexpr int THREADS = 32 * WARPS, OUTS = OUT_TILES * 16, TILE = WARPS / SLICES * OUTS, ROWS = ROW_TILES * 8;
constexpr int GROUPS = 2, SLICE = GROUPS * 64, STEP = SLICES * SLICE;
constexpr int X_STRIDE = STEP + 8;  // 16 bytes more, so that eight rows begin at different banks
constexpr int PAIRS = 256, LANES = 32;
constexpr int OWN = (OUTS + LANES - 1) / LANES;    // outputs whose scales a lane computes
constexpr int LEVELS = 4, LEVEL_COLUMNS = 4 * 64;  // of a word
static_assert(THREADS == 256, "a thread copies one of the levels' numbers");
static_assert(SLICES <= 2 && (WORDS == 1 || WORDS == 4), "a step's levels are in one word, which one load brings");

typedef unsigned short bf16;

__device__ float to_float(bf16 value) { return __uint_as_float(static_cast<unsigned>(value) << 16); }

__device__ bf16 to_bf16(float value) {
    bf16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
}

struct Source {
    const unsigned char *packed, *levels;
    const float *level_scales, *means;
    int num_out, num_in;
};

// Packed weights of a slice for one lane: of outputs `place` and `place` + 8 of each tile of 16, 32 columns each.
struct Weights {
    uint4 bytes[OUT_TILES][2];
};

// What a lane needs for the scales of its own outputs: their levels, a byte a group, and what groups share.
struct Scales {
    unsigned levels[OWN][WORDS];
    float factor[OWN], mean[OWN];
};

__device__ int slice_of_warp() { return threadIdx.x / LANES % SLICES; }

// The warp's first output in a tile.
__device__ int first_out() { return threadIdx.x / LANES / SLICES * OUTS; }

// Outputs that are not there are computed like the last one.
__device__ int output_of(int tile, int m, int half, int num_out) {
    return min(tile * TILE + first_out() + m * 16 + half * 8 + (threadIdx.x % LANES >> 2), num_out - 1);
}

__device__ void find_rows(unsigned (&rows)[OUT_TILES][2], const Source& source, int tile) {
#pragma unroll
    for (int m = 0; m < OUT_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            rows[m][half] = static_cast<unsigned>(output_of(tile, m, half, source.num_out)) * source.num_in;
}

__device__ void load_weights(Weights& weights, const Source& source, const unsigned (&rows)[OUT_TILES][2], int column) {
#pragma unroll
    for (int m = 0; m < OUT_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned char* bytes = source.packed + (rows[m][half] + column) / 2;
            const uint4* place = reinterpret_cast<const uint4*>(bytes) + (threadIdx.x & 3);
            uint4& four = weights.bytes[m][half];
            if (FETCHES_LINES)  // the other half of the line comes into L2, to be read in the next step
                asm volatile("ld.global.cs.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
                             : "l"(place));
            else
                four = __ldcs(place);
        }
    __syncwarp();  // holds the loads here: the compiler would move them down to where the weights are used
}

// Loads what a step needs that is not there yet; `is_new` where nothing of its tile is.
__device__ void load_scales(Scales& scales, const Source& source, int tile, int column, bool is_new) {
#pragma unroll
    for (int own = 0; own < OWN; own++) {
        const int out = min(tile * TILE + first_out() + own * LANES + static_cast<int>(threadIdx.x) % LANES, source.num_out - 1);
        const unsigned first = static_cast<unsigned>(out) * source.num_in + column;
        if (is_new || column % (LEVEL_COLUMNS * WORDS) == 0) {
            const unsigned word = first / LEVEL_COLUMNS / WORDS * WORDS;
            if (WORDS == 4) {
                const uint4 levels = __ldg(reinterpret_cast<const uint4*>(source.levels + word * LEVELS));
                scales.levels[own][0] = levels.x, scales.levels[own][1 % WORDS] = levels.y;
                scales.levels[own][2 % WORDS] = levels.z, scales.levels[own][3 % WORDS] = levels.w;
            } else scales.levels[own][0] = __ldg(reinterpret_cast<const unsigned*>(source.levels + word * LEVELS));
        }
        if (is_new || first % (64 * 256) == 0) scales.factor[own] = __ldg(source.level_scales + first / (64 * 256));
        if (is_new) scales.mean[own] = __ldg(source.means + out);
    }
}

// Writes the scales of the warp's slice of a step where all lanes find them.
__device__ void store_scales(float2* target, const Scales& scales, const float* level_code, int column) {
    const int lane = threadIdx.x % LANES, first = (column / 64 + slice_of_warp() * GROUPS) % LEVELS;
    const int place = column / LEVEL_COLUMNS % WORDS;
    __syncwarp();
#pragma unroll
    for (int own = 0; own < OWN; own++) {
        unsigned levels = scales.levels[own][0];
#pragma unroll
        for (int word = 1; word < WORDS; word++)
            levels = place == word ? scales.levels[own][word] : levels;
        levels >>= 8 * first;
        const float x = level_code[levels & 0xff] * scales.factor[own] + scales.mean[own];
        const float y = level_code[levels >> 8 & 0xff] * scales.factor[own] + scales.mean[own];
        if (own * LANES + lane < OUTS) target[own * LANES + lane] = make_float2(x, y);
    }
    __syncwarp();
}

// A lane has loaded 32 columns of one group, which is the fastest way; a product needs 16 of each: lanes two apart exchange halves.
// Afterwards a lane holds 16 columns of both groups, from (quad & 1) * 32 + (quad >> 1) * 16 on.
__device__ void exchange(uint4& bytes) {
    const bool is_first = !(threadIdx.x & 2);
    const unsigned x = __shfl_xor_sync(0xffffffff, is_first ? bytes.z : bytes.x, 2);
    const unsigned y = __shfl_xor_sync(0xffffffff, is_first ? bytes.w : bytes.y, 2);
    if (is_first) bytes.z = x, bytes.w = y;
    else bytes.x = x, bytes.y = y;
}

// Copies a step's columns of x; rows that are not there become 0.
__device__ void load_x(bf16* target, const bf16* x, int num_rows, int num_in, int column) {
    constexpr int CHUNKS = STEP / 8;
    const int chunk = threadIdx.x % CHUNKS;
#pragma unroll
    for (int first = 0; first < ROWS; first += THREADS / CHUNKS) {
        const int row = first + threadIdx.x / CHUNKS;
        if (row >= ROWS) break;
        const bf16* from = x + static_cast<long long>(min(row, num_rows - 1)) * num_in + column + chunk * 8;
        const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(target + row * X_STRIDE + chunk * 8));
        const int size = row < num_rows ? 16 : 0;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

__device__ void multiply(float (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Returns the two numbers of one byte of a word. What is shifted is the byte's offset in the table; `own` the lane's in a row of it.
__device__ unsigned look_up(const char* pairs, unsigned word, int byte, unsigned own) {
    const unsigned shifted = byte ? word >> (8 * byte - 7) : word << 7;
    return *reinterpret_cast<const unsigned*>(pairs + (shifted & 0x7f80 | own));
}

// Adds a slice to the sums. The products take its columns in another order than they lie in, the same one for x and W.
__device__ void add_slice(float (&total)[OUT_TILES][ROW_TILES][4], Weights& weights, const float2* scales, const bf16* x,
                          const char* pairs) {
    const int lane = threadIdx.x & 31, place = lane >> 2, first = (lane & 1) * 32 + (lane >> 1 & 1) * 16;
#pragma unroll
    for (int m = 0; m < OUT_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) exchange(weights.bytes[m][half]);
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        uint4 columns[ROW_TILES][2];
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            const uint4* from = reinterpret_cast<const uint4*>(x + (n * 8 + place) * X_STRIDE + group * 64 + first);
            columns[n][0] = from[0];
            columns[n][1] = from[1];
        }
#pragma unroll
        for (int m = 0; m < OUT_TILES; m++) {
            float own[ROW_TILES][4] = {};
#pragma unroll
            for (int step = 0; step < 4; step++) {
                unsigned a[4];
#pragma unroll
                for (int part = 0; part < 4; part++) {
                    const uint4 bytes = weights.bytes[m][part & 1];
                    const unsigned word = group ? (step < 2 ? bytes.z : bytes.w) : (step < 2 ? bytes.x : bytes.y);
                    a[part] = look_up(pairs, word, (step & 1) * 2 + (part >> 1), lane * 4);
                }
#pragma unroll
                for (int n = 0; n < ROW_TILES; n++) {
                    const uint4 four = columns[n][step >> 1];
                    if (step & 1) multiply(own[n], a[0], a[1], a[2], a[3], four.z, four.w);
                    else multiply(own[n], a[0], a[1], a[2], a[3], four.x, four.y);
                }
            }
            float scale[2];
#pragma unroll
            for (int half = 0; half < 2; half++)
                scale[half] = reinterpret_cast<const float*>(scales + m * 16 + half * 8 + place)[group];
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
                for (int index = 0; index < 4; index++) total[m][n][index] += own[n][index] * scale[index >> 1];
        }
    }
}

// Writes what a block has of a tile, and begins anew.
__device__ void store_part(float (&total)[OUT_TILES][ROW_TILES][4], float* part, int num_rows) {
    const int lane = threadIdx.x & 31, quad = lane & 3, place = lane >> 2;
#pragma unroll
    for (int m = 0; m < OUT_TILES; m++)
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int index = 0; index < 4; index++) {
                const int row = n * 8 + quad * 2 + (index & 1);
                const int out = first_out() + m * 16 + (index >> 1) * 8 + place;
                if (row < num_rows) part[row * TILE + out] = total[m][n][index];
                total[m][n][index] = 0;
            }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
few_nf4(const bf16* x, const unsigned char* packed, const unsigned char* levels, const float* level_code,
        const float* level_scales, const float* all_means, const unsigned* pairs, float* parts, int num_rows, int num_out, int num_in,
        int num_steps, int steps_a_block) {
    extern __shared__ uint4 memory[];
    const char* own_pairs = reinterpret_cast<const char*>(memory);
    float* own_code = reinterpret_cast<float*>(memory + PAIRS * LANES / 4);
    float2* own_scales = reinterpret_cast<float2*>(own_code + 256) + threadIdx.x / LANES * OUTS;
    bf16* own_x = reinterpret_cast<bf16*>(reinterpret_cast<float2*>(own_code + 256) + WARPS * OUTS);
    const Source source = {packed, levels, level_scales, all_means, num_out, num_in};
    const int first = blockIdx.x * steps_a_block, last = min(first + steps_a_block, num_steps), slice = slice_of_warp();
    int tile = first / (num_in / STEP), column = (first - tile * (num_in / STEP)) * STEP;

    Weights weights[2];
    Scales scales;
    unsigned rows[OUT_TILES][2];
    find_rows(rows, source, tile);
    load_weights(weights[0], source, rows, column + slice * SLICE);
    load_scales(scales, source, tile, column, true);
    load_x(own_x, x, num_rows, num_in, column);
    for (int index = threadIdx.x; index < PAIRS * LANES / 4; index += THREADS) {
        const unsigned pair = pairs[index / (LANES / 4)];
        memory[index] = make_uint4(pair, pair, pair, pair);
    }
    own_code[threadIdx.x] = level_code[threadIdx.x];

    float total[OUT_TILES][ROW_TILES][4] = {};
    for (int pair = first; pair < last; pair += 2) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bool is_last = pair + half + 1 >= last;
            if (pair + half >= last) break;
            asm volatile("cp.async.wait_group 0;" ::: "memory");
            __syncthreads();  // this step's x is there, and the other half of own_x is no longer read
            store_scales(own_scales, scales, own_code, column);
            column += STEP;
            const bool is_tile_over = column == num_in;
            if (is_tile_over) {
                column = 0;
                find_rows(rows, source, tile + 1);
            }
            if (!is_last) {
                load_x(own_x + (1 - half) * ROWS * X_STRIDE, x, num_rows, num_in, column);
                load_weights(weights[1 - half], source, rows, column + slice * SLICE);
                load_scales(scales, source, tile + is_tile_over, column, is_tile_over);
            }
            add_slice(total, weights[half], own_scales, own_x + half * ROWS * X_STRIDE + slice * SLICE, own_pairs);
            if (!is_last && !is_tile_over) continue;
            store_part(total, parts + (static_cast<long long>(blockIdx.x + tile) * SLICES + slice) * num_rows * TILE, num_rows);
            tile++;
        }
    }
}

// Sums the parts of each tile, and the residual where there is one.
extern "C" __global__ void add_parts(const float* parts, const bf16* residual, bf16* target, int num_rows, int num_out,
                                     int steps_a_tile, int steps_a_block) {
    const int out = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (out >= num_out) return;
    const int tile = out / TILE, first = tile * steps_a_tile / steps_a_block;
    const int last = ((tile + 1) * steps_a_tile - 1) / steps_a_block;
    const long long place = static_cast<long long>(row) * num_out + out;
    float sum = residual ? to_float(residual[place]) : 0;
    for (int part = (first + tile) * SLICES; part < (last + tile + 1) * SLICES; part++)
        sum += parts[(static_cast<long long>(part) * num_rows + row) * TILE + out % TILE];
    target[place] = to_bf16(sum);
}
