// x W^T for few rows of x, W unpacked from NF4 with double quantisation on the fly; launched by finlora/model/kernels/nf4_products.py.
//
// Shapes: T rows, K in, N out. W is read once, in the tiles of finlora/model/kernels/nf4_tiles.cuh; the arithmetic hides behind
// these reads. A byte holds two codes, so a table of 256 pairs of bfloat16 gives both values by one read of shared memory. Each lane
// of a warp has its own copy of the table, since lanes that read different entries of one table would have bank conflicts. The scale
// of a group is multiplied into its sums in float32.
//
// A step is one column of tiles, a tile for each warp of a block. All blocks take the same number of steps, along the columns and on
// into the next outputs. A block writes its partial sums to memory of its own, and add_parts sums the parts in a fixed order. The
// next half of a tile is loaded while one is computed.
//
// On Hopper a kernel may start while the one before it ends, and loads its first weights meanwhile.
//
// Defined at compilation: WARPS of a block, ROW_TILES of 8 rows, BLOCKS of a multiprocessor, and X_PARTS, the parts in which the
// columns of x of a step are loaded: two parts need half the shared memory and synchronise the block twice a step.

constexpr int THREADS = LANES * WARPS, ROWS = ROW_TILES * 8;
constexpr int HEIGHT = WARPS * OUTS;   // outputs of a step
constexpr int X_COLUMNS = COLUMNS / X_PARTS, X_STRIDE = X_COLUMNS + 8;  // 16 bytes of padding: eight rows start at different banks
static_assert(X_PARTS == 1 || X_PARTS == HALVES, "a half of a tile needs one part of x");
static_assert(THREADS == PAIRS, "a thread copies the value of one level");

// Returns a warp's tile of a step; outputs past the end are computed as copies of the last ones.
__device__ const unsigned char* find_tile(const unsigned char* tiles, int height, int column, int num_out, int num_columns) {
    const int strip = min(height * WARPS + static_cast<int>(threadIdx.x) / LANES, (num_out + OUTS - 1) / OUTS - 1);
    return tiles + (static_cast<long long>(strip) * num_columns + column) * TILE_STRIDE;
}

// Writes a tile's scales to shared memory.
__device__ void store_scales(float4* target, unsigned levels, float factor, float mean, const float* level_code) {
    __syncwarp();
    float scales[GROUPS];
#pragma unroll
    for (int group = 0; group < GROUPS; group++) scales[group] = level_code[levels >> 8 * group & 0xff] * factor + mean;
    target[threadIdx.x % LANES] = make_float4(scales[0], scales[1], scales[2], scales[3]);
    __syncwarp();
}

// Copies columns of x to shared memory; rows past the end become 0.
__device__ void load_x(bf16* target, const bf16* x, int num_rows, int num_in, int column) {
    constexpr int CHUNKS = X_COLUMNS / 8;
    const int chunk = threadIdx.x % CHUNKS;
#pragma unroll
    for (int first = 0; first < ROWS; first += THREADS / CHUNKS) {
        const int row = first + threadIdx.x / CHUNKS;
        if (row >= ROWS) break;
        const bf16* from = x + static_cast<long long>(min(row, num_rows - 1)) * num_in + column + chunk * 8;
        copy_16_bytes(target + row * X_STRIDE + chunk * 8, from, row < num_rows);
    }
    end_copies();
}

// Waits until the whole block sees the last copy and has stopped reading the buffer before it.
__device__ void wait_for_x() {
    wait_for_copies();
    __syncthreads();
}

// Returns the two values of one byte of a word. `shifted` is the byte's row in the table, `own` the lane's offset in that row.
__device__ unsigned look_up(const char* pairs, unsigned word, int byte, unsigned own) {
    const unsigned shifted = byte ? word >> (8 * byte - 7) : word << 7;
    return *reinterpret_cast<const unsigned*>(pairs + (shifted & 0x7f80 | own));
}

// Adds half a tile's products to the sums; `x` starts at its columns. A lane's columns of a group are contiguous: the products take
// them in this order, of x and of W.
__device__ void add_half(float (&total)[OUT_TILES][ROW_TILES][4], const Half& half, const float4* scales, const bf16* x,
                         const char* pairs, int first_group) {
    const int lane = threadIdx.x % LANES, lane_row = lane >> 2, quad = lane & 3;
#pragma unroll
    for (int group = 0; group < HALF_GROUPS; group++) {
        uint4 columns[ROW_TILES][2];
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            const uint4* from = reinterpret_cast<const uint4*>(x + (n * 8 + lane_row) * X_STRIDE + group * 64 + quad * 16);
            columns[n][0] = from[0];
            columns[n][1] = from[1];
        }
#pragma unroll
        for (int m = 0; m < OUT_TILES; m++) {
            float own[ROW_TILES][4] = {};
            const uint4 four = half.bytes[m][group];
#pragma unroll
            for (int step = 0; step < 4; step++) {
                const unsigned word = step < 2 ? (step ? four.y : four.x) : (step == 2 ? four.z : four.w);
                unsigned a[4];
#pragma unroll
                for (int part = 0; part < 4; part++) a[part] = look_up(pairs, word, part, lane * 4);
#pragma unroll
                for (int n = 0; n < ROW_TILES; n++) {
                    const uint4 b = columns[n][step >> 1];
                    if (step & 1) multiply(own[n], a, b.z, b.w);
                    else multiply(own[n], a, b.x, b.y);
                }
            }
            float scale[2];
#pragma unroll
            for (int eight = 0; eight < 2; eight++)
                scale[eight] = reinterpret_cast<const float*>(scales + m * 16 + eight * 8 + lane_row)[first_group + group];
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
                for (int index = 0; index < 4; index++) total[m][n][index] += own[n][index] * scale[index >> 1];
        }
    }
}

// Writes a block's partial sums and resets them.
__device__ void store_part(float (&total)[OUT_TILES][ROW_TILES][4], float* part, int num_rows) {
    const int lane = threadIdx.x % LANES, quad = lane & 3, lane_row = lane >> 2;
#pragma unroll
    for (int m = 0; m < OUT_TILES; m++)
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int index = 0; index < 4; index++) {
                const int row = n * 8 + quad * 2 + (index & 1);
                const int out = threadIdx.x / LANES * OUTS + m * 16 + (index >> 1) * 8 + lane_row;
                if (row < num_rows) part[row * HEIGHT + out] = total[m][n][index];
                total[m][n][index] = 0;
            }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
few_nf4(const bf16* x, const unsigned char* tiles, const float* level_code, const float* level_scales, const float* means,
        const unsigned* pairs, float* parts, int num_rows, int num_out, int num_in, int num_steps, int steps_a_block) {
    extern __shared__ uint4 memory[];
    const int num_columns = num_in / COLUMNS;
    const char* own_pairs = reinterpret_cast<const char*>(memory);
    float* own_code = reinterpret_cast<float*>(memory + PAIRS * LANES / 4);
    float4* all_scales = reinterpret_cast<float4*>(own_code + PAIRS);
    float4* own_scales = all_scales + threadIdx.x / LANES * OUTS;
    bf16* own_x = reinterpret_cast<bf16*>(all_scales + HEIGHT);
    const int first = blockIdx.x * steps_a_block, last = min(first + steps_a_block, num_steps);
    int height = first / num_columns, column = first - height * num_columns;

    let_next_kernel_begin();
    const unsigned char* tile = find_tile(tiles, height, column, num_out, num_columns);
    Half halves[HALVES];
    load_half(halves[0], tile);
    unsigned levels = load_levels(tile);
    int out = min(height * HEIGHT + static_cast<int>(threadIdx.x), num_out - 1);  // output whose scales this thread computes
    float mean = __ldg(means + out);
    float factor = __ldg(level_scales + (static_cast<unsigned>(out) * num_in + column * COLUMNS) / NESTED);
    for (int index = threadIdx.x; index < PAIRS * LANES / 4; index += THREADS) {
        const unsigned pair = pairs[index / (LANES / 4)];
        memory[index] = make_uint4(pair, pair, pair, pair);
    }
    own_code[threadIdx.x] = level_code[threadIdx.x];
    wait_for_kernel_before();
    load_x(own_x, x, num_rows, num_in, column * COLUMNS);

    float total[OUT_TILES][ROW_TILES][4] = {};
    for (int step = first; step < last; step++) {
        bf16* now = own_x + (X_PARTS == 1 ? (step - first) % 2 : 0) * ROWS * X_STRIDE;
        bf16* next = own_x + (X_PARTS == 1 ? (step - first + 1) % 2 : 1) * ROWS * X_STRIDE;
        wait_for_x();
        load_half(halves[1], tile + HALF_BYTES);
        store_scales(own_scales, levels, factor, mean, own_code);
        if (X_PARTS == 2) load_x(next, x, num_rows, num_in, column * COLUMNS + X_COLUMNS);
        const bool is_last = step + 1 == last, is_over = ++column == num_columns;
        if (is_over) column = 0;
        if (X_PARTS == 1 && !is_last) load_x(next, x, num_rows, num_in, column * COLUMNS);
        add_half(total, halves[0], own_scales, now, own_pairs, 0);
        if (X_PARTS == 2) {
            wait_for_x();
            if (!is_last) load_x(now, x, num_rows, num_in, column * COLUMNS);
        }
        if (!is_last) {
            tile = is_over ? find_tile(tiles, height + 1, 0, num_out, num_columns) : tile + TILE_STRIDE;
            load_half(halves[0], tile);
            levels = load_levels(tile);
            if (is_over) {
                out = min(out + HEIGHT, num_out - 1);
                mean = __ldg(means + out);
            }
            const unsigned weight = static_cast<unsigned>(out) * num_in + column * COLUMNS;
            if (is_over || weight % NESTED == 0) factor = __ldg(level_scales + weight / NESTED);
        }
        add_half(total, halves[1], own_scales, X_PARTS == 1 ? now + HALF_GROUPS * 64 : next, own_pairs, HALF_GROUPS);
        if (!is_last && !is_over) continue;
        store_part(total, parts + static_cast<long long>(blockIdx.x + height) * num_rows * HEIGHT, num_rows);
        height++;
    }
}

// Returns the sum of an output's parts.
__device__ float sum_parts(const float* parts, int row, int out, int num_rows, int num_columns, int steps_a_block) {
    const int height = out / HEIGHT, first = height * num_columns / steps_a_block;
    const int last = ((height + 1) * num_columns - 1) / steps_a_block;
    float sum = 0;
    for (int part = first + height; part <= last + height; part++)
        sum += parts[(static_cast<long long>(part) * num_rows + row) * HEIGHT + out % HEIGHT];
    return sum;
}

// Sums the parts of each output, and the residual where there is one.
extern "C" __global__ void add_parts(const float* parts, const bf16* residual, bf16* target, int num_rows, int num_out,
                                     int num_columns, int steps_a_block) {
    let_next_kernel_begin();
    wait_for_kernel_before();
    const int out = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (out >= num_out) return;
    const long long index = static_cast<long long>(row) * num_out + out;
    const float sum = sum_parts(parts, row, out, num_rows, num_columns, steps_a_block);
    target[index] = to_bf16(residual ? sum + to_float(residual[index]) : sum);
}

// As add_parts, for a gate and an up projection of num_out outputs each: writes silu(gate) * up, both rounded to bfloat16 first.
extern "C" __global__ void add_gated_parts(const float* parts, bf16* target, int num_rows, int num_out, int num_columns,
                                           int steps_a_block) {
    let_next_kernel_begin();
    wait_for_kernel_before();
    const int out = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (out >= num_out) return;
    const float gate = to_float(to_bf16(sum_parts(parts, row, out, num_rows, num_columns, steps_a_block)));
    const float up = to_float(to_bf16(sum_parts(parts, row, num_out + out, num_rows, num_columns, steps_a_block)));
    const float opened = to_float(to_bf16(gate / (1 + __expf(-gate))));
    target[static_cast<long long>(row) * num_out + out] = to_bf16(opened * up);
}
