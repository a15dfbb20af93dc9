// x W^T for few rows of x, W unpacked from NF4 with double quantisation on the way; finlora/model/few_nf4.py launches it.
//
// Shapes: T rows, K in, N out. W is read once; what it costs besides should hide behind that. A byte holds two numbers, so a table
// of 256 pairs of bfloat16 gives both by one read of shared memory, a copy of the table for each lane of a warp: lanes that read
// different entries of one table would wait for each other. A group of 64 columns shares a scale, which is multiplied into the
// group's sums in float32.
//
// A tile is TILE outputs, a unit UNIT columns of one, taken in two pieces. Blocks take equally many units, one after the other
// along a tile and on into the next; what a block has of a tile goes to a place of its own, and add_parts sums these in a fixed
// order. A piece is on its way from memory while the one before is computed.
//
// Defined when this is compiled: WARPS of a block, OUT_TILES of 16 outputs for each, and ROW_TILES of 8 rows.

constexpr int THREADS = 32 * WARPS, TILE = WARPS * OUT_TILES * 16, ROWS = ROW_TILES * 8;
constexpr int GROUPS = 2, PIECE = GROUPS * 64, UNIT = 2 * PIECE;
constexpr int X_STRIDE = PIECE + 8;  // 16 bytes more, so that eight rows begin at different banks
constexpr int PAIRS = 256, LANES = 32;
static_assert(THREADS == 256, "a thread copies one of the levels' numbers");

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

// Packed weights of a piece for one lane: of outputs `place` and `place` + 8 of each tile of 16, 32 columns each.
struct Weights {
    uint4 bytes[OUT_TILES][2];
};

// The scales of a unit's four groups for these outputs: one byte a group, and the factor that they share.
struct Scales {
    unsigned levels[OUT_TILES][2];
    float factor[OUT_TILES][2];
};

// Outputs that are not there are computed like the last one.
__device__ int output_of(int tile, int m, int half, int num_out) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    return min(tile * TILE + (warp * OUT_TILES + m) * 16 + half * 8 + (lane >> 2), num_out - 1);
}

__device__ void find_rows(unsigned (&rows)[OUT_TILES][2], const Source& source, int tile) {
#pragma unroll
    for (int m = 0; m < OUT_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            rows[m][half] = static_cast<unsigned>(output_of(tile, m, half, source.num_out)) * source.num_in;
}

__device__ void load_means(float (&means)[OUT_TILES][2], const Source& source, int tile) {
#pragma unroll
    for (int m = 0; m < OUT_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) means[m][half] = __ldg(source.means + output_of(tile, m, half, source.num_out));
}

__device__ void load_weights(Weights& weights, const Source& source, const unsigned (&rows)[OUT_TILES][2], int column) {
#pragma unroll
    for (int m = 0; m < OUT_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned char* bytes = source.packed + (rows[m][half] + column) / 2;
            weights.bytes[m][half] = __ldcs(reinterpret_cast<const uint4*>(bytes) + (threadIdx.x & 3));
        }
}

__device__ void load_scales(Scales& scales, const Source& source, const unsigned (&rows)[OUT_TILES][2], int column) {
#pragma unroll
    for (int m = 0; m < OUT_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned first = rows[m][half] + column;
            scales.levels[m][half] = __ldg(reinterpret_cast<const unsigned*>(source.levels + first / 64));
            scales.factor[m][half] = __ldg(source.level_scales + first / (64 * 256));
        }
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

// Copies a piece's columns of x; rows that are not there become 0.
__device__ void load_x(bf16* target, const bf16* x, int num_rows, int num_in, int column) {
    constexpr int CHUNKS = PIECE / 8;
    for (int index = threadIdx.x; index < ROWS * CHUNKS; index += THREADS) {
        const int row = index / CHUNKS, chunk = index % CHUNKS;
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

// Adds a piece to the sums. The products take its columns in another order than they lie in, the same one for x and W.
__device__ void add_piece(float (&total)[OUT_TILES][ROW_TILES][4], Weights& weights, const Scales& scales,
                          const float (&means)[OUT_TILES][2], const bf16* x, const char* pairs, const float* level_code, int piece) {
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
            for (int half = 0; half < 2; half++) {
                const unsigned level = scales.levels[m][half] >> (8 * (piece * GROUPS + group)) & 0xff;
                scale[half] = level_code[level] * scales.factor[m][half] + means[m][half];
            }
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
                for (int index = 0; index < 4; index++) total[m][n][index] += own[n][index] * scale[index >> 1];
        }
    }
}

// Writes what a block has of a tile, and begins anew.
__device__ void store_part(float (&total)[OUT_TILES][ROW_TILES][4], float* part, int num_rows) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quad = lane & 3, place = lane >> 2;
#pragma unroll
    for (int m = 0; m < OUT_TILES; m++)
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int index = 0; index < 4; index++) {
                const int row = n * 8 + quad * 2 + (index & 1);
                const int out = (warp * OUT_TILES + m) * 16 + (index >> 1) * 8 + place;
                if (row < num_rows) part[row * TILE + out] = total[m][n][index];
                total[m][n][index] = 0;
            }
}

extern "C" __global__ void __launch_bounds__(THREADS, ROW_TILES > 2 ? 1 : 2)
few_nf4(const bf16* x, const unsigned char* packed, const unsigned char* levels, const float* level_code,
        const float* level_scales, const float* all_means, const unsigned* pairs, float* parts, int num_rows, int num_out, int num_in,
        int num_units, int units_a_block) {
    extern __shared__ uint4 memory[];
    const char* own_pairs = reinterpret_cast<const char*>(memory);
    float* own_code = reinterpret_cast<float*>(memory + PAIRS * LANES / 4);
    bf16* own_x = reinterpret_cast<bf16*>(own_code + 256);
    const Source source = {packed, levels, level_scales, all_means, num_out, num_in};
    const int first = blockIdx.x * units_a_block, last = min(first + units_a_block, num_units);
    int tile = first / (num_in / UNIT), column = (first - tile * (num_in / UNIT)) * UNIT;

    Weights weights[2];
    Scales scales, next_scales;
    unsigned rows[OUT_TILES][2];
    float means[OUT_TILES][2];
    find_rows(rows, source, tile);
    load_weights(weights[0], source, rows, column);
    load_scales(next_scales, source, rows, column);
    load_x(own_x, x, num_rows, num_in, column);
    load_means(means, source, tile);
    for (int index = threadIdx.x; index < PAIRS * LANES / 4; index += THREADS) {
        const unsigned pair = pairs[index / (LANES / 4)];
        memory[index] = make_uint4(pair, pair, pair, pair);
    }
    own_code[threadIdx.x] = level_code[threadIdx.x];

    float total[OUT_TILES][ROW_TILES][4] = {};
    for (int unit = first; unit < last; unit++) {
        scales = next_scales;
        bool is_tile_over = false;
#pragma unroll
        for (int piece = 0; piece < 2; piece++) {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
            __syncthreads();  // this piece's x is there, and the other half of own_x is no longer read
            column += PIECE;
            if (piece && column == num_in) {
                column = 0;
                is_tile_over = true;
                find_rows(rows, source, tile + 1);
            }
            if (!piece || unit + 1 < last) {
                load_x(own_x + (1 - piece) * ROWS * X_STRIDE, x, num_rows, num_in, column);
                load_weights(weights[1 - piece], source, rows, column);
                if (piece) load_scales(next_scales, source, rows, column);
            }
            add_piece(total, weights[piece], scales, means, own_x + piece * ROWS * X_STRIDE, own_pairs, own_code, piece);
        }
        if (unit + 1 < last && !is_tile_over) continue;
        store_part(total, parts + static_cast<long long>(blockIdx.x + tile) * num_rows * TILE, num_rows);
        tile++;
        load_means(means, source, tile);
    }
}

// Sums the parts of each tile, and the residual where there is one.
extern "C" __global__ void add_parts(const float* parts, const bf16* residual, bf16* target, int num_rows, int num_out,
                                     int units_a_tile, int units_a_block) {
    const int out = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (out >= num_out) return;
    const int tile = out / TILE, first = tile * units_a_tile / units_a_block;
    const int last = ((tile + 1) * units_a_tile - 1) / units_a_block;
    const long long place = static_cast<long long>(row) * num_out + out;
    float sum = residual ? to_float(residual[place]) : 0;
    for (int block = first; block <= last; block++)
        sum += parts[(static_cast<long long>(block + tile) * num_rows + row) * TILE + out % TILE];
    target[place] = to_bf16(sum);
}
