// FusedNMS: from a detector's raw head to its detections, in two kernels. README.md beside this file says how and why.
//
//   select    one block for 64 candidates of an image: scores, threshold; what passes becomes a 64-bit key, and its box is decoded
//   suppress  one block an image: keys in order, greedy suppression, output
//
// A key is (score, candidate number, class) in one integer, so that a larger key is a better candidate: scores first, and among equals
// the lower candidate, then the lower class. No two are equal, so nothing depends on the order in which threads ran.
//
// No header is included, neither of CUDA nor of TensorRT: NVRTC compiles this file as it stands, and so does nvcc. A C++ compiler does
// too, for tests on a CPU (tests/emulation).

namespace fusenms {

// What the kernels have to know, all of it plain numbers. ONE(type, name) is a number, MANY(type, name, count) an array.
// fusenms/backends/plugin.py mirrors this list, a test compares them.
#define FUSENMS_SETTINGS(ONE, MANY)                                                                                                \
    MANY(int, classes, 3)        /* where the scores stand: channel axis (1 or 2), channels of the tensor, first channel */        \
    MANY(int, boxes, 3)          /* the same of the box terms */                                                                   \
    MANY(int, objectness, 3)     /* axis 0: there is none; so for the next two */                                                  \
    MANY(int, background, 3)                                                                                                       \
    MANY(int, angle, 3)                                                                                                            \
    ONE(int, num_classes)                                                                                                          \
    ONE(int, activation)         /* Activation */                                                                                  \
    ONE(int, multi_label)        /* every class above the threshold is a candidate, not only the best of each */                   \
    ONE(float, score_threshold)  /* a score passes that is above it; of logits where `activation` is sigmoid, without objectness */ \
    ONE(float, objectness_weight) /* w: the score is objectness^w class^(1 - w); negative: their product */                        \
    ONE(int, decode)             /* Decode */                                                                                      \
    ONE(int, normalized)         /* decoded boxes are from 0 to 1 */                                                               \
    ONE(int, bins)               /* of a distance */                                                                               \
    MANY(float, values, 64)      /* what each bin stands for */                                                                    \
    ONE(float, point)            /* where in a cell distances start */                                                             \
    ONE(int, height)             /* of the picture, in pixels; for who launches: 0 where it is that of the picture given */        \
    ONE(int, width)                                                                                                                \
    ONE(int, levels)                                                                                                               \
    ONE(int, anchors)            /* of a cell */                                                                                   \
    MANY(int, strides, 8)        /* pixels */                                                                                      \
    MANY(float, anchor_sizes, 64) /* width, height in pixels; by level, then anchor */                                             \
    ONE(int, angle_sigmoid)      /* the angle is (sigmoid - 1/4) pi */                                                             \
    ONE(int, class_agnostic)                                                                                                       \
    ONE(float, overlap_limit)    /* oriented: twice the Bhattacharyya distance below which boxes overlap; else the IoU above which */ \
    ONE(float, farthest)         /* pixels; the sum of a box's coordinates is below it, else the box never wins */                 \
    ONE(int, max_candidates)     /* best of an image that are looked at */                                                         \
    ONE(int, max_detections)     /* rows of the outputs */

struct Settings {
#define FUSENMS_ONE(type, name) type name;
#define FUSENMS_MANY(type, name, count) type name[count];
    FUSENMS_SETTINGS(FUSENMS_ONE, FUSENMS_MANY)
#undef FUSENMS_ONE
#undef FUSENMS_MANY
};

enum Activation { ACTIVATION_NONE, ACTIVATION_SIGMOID, ACTIVATION_SOFTMAX };
enum Decode { DECODED_XYXY, DECODED_CXCYWH, DISTANCES, ANCHOR_BOXES, GRID_OFFSETS, TANH_OFFSETS };

typedef unsigned long long Key;
struct Half {
    unsigned short bits;
};

constexpr int SELECT_BLOCKS = 4;  // of a multiprocessor, at the least
constexpr int SELECT_THREADS = 256, TILE = 64, GROUPS = SELECT_THREADS / TILE;  // candidates of a block, threads of a candidate
static_assert(GROUPS == 4, "a candidate has a thread for each of four distances");
constexpr int SUPPRESS_THREADS = 1024, WARPS = SUPPRESS_THREADS / 32;
constexpr int RUN = 4096, OWN = RUN / SUPPRESS_THREADS;  // keys that are sorted at once, those of a thread
constexpr int BUCKETS = SUPPRESS_THREADS, CROWDED = 128;  // of the sort, and keys of one from which on it sorts by pairs
constexpr int CHUNK = 128, WORDS = CHUNK / 32;            // candidates that are decided at once
constexpr int INDEXED = 512, ROW_WORDS = INDEXED / 32;    // kept rows that an index has
constexpr int CELLS = 32;                                 // columns, rows and labels that are told apart, a bit of a mask each
constexpr int FEW = 1;                                    // boxes that are compared without asking for their cells
constexpr float CELL = 128.0f;                            // pixels
constexpr int MOST_NUMBERS = 7;                 // of a `Shape`
constexpr int READERS = 4;                      // threads that read the keys of a tile
constexpr int CLASSES_AT_ONCE = 20, BINS_AT_ONCE = 16;  // numbers that a thread waits for at the same time
constexpr float PI = 3.14159265358979f;
constexpr float THINNEST = 1e-3f;  // pixels; an oriented box with a side not above it overlaps nothing
constexpr unsigned EVERY_LANE = 0xffffffffu;

__device__ inline float load(const float* p) {
    return *p;
}

__device__ inline float load(const Half* p) {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(p->bits));
    return value;
#else
    return half_to_float(p->bits);
#endif
}

__device__ inline float infinity() {
    return __int_as_float(0x7f800000);
}

// NaN and +infinity never win.
__device__ inline bool usable(float score) {
    return score < infinity();
}

__device__ inline float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

// Channel `channel` of a tap, of one candidate of an image, in a tensor [B, C, N] (axis 1) or [B, N, C] (axis 2).
template <typename T>
__device__ inline float channel(const T* tensor, const int* tap, int candidates, int image, int anchor, int channel) {
    const int axis = tap[0], width = tap[1], at = tap[2] + channel;
    const long long row = static_cast<long long>(image) * (axis == 1 ? width : candidates) + (axis == 1 ? at : anchor);
    return load(tensor + row * (axis == 1 ? candidates : width) + (axis == 1 ? anchor : at));
}

// Visit (i, load(i)) for i = first, first + step, … below `end`, in order. AT_ONCE of them are loaded before the first is visited, so that
// memory is waited for once, not once for each.
template <int AT_ONCE, typename Load, typename Visit>
__device__ inline void visit_each(int first, int end, int step, Load load, Visit visit) {
#pragma unroll 1
    for (; first + (AT_ONCE - 1) * step < end; first += AT_ONCE * step) {
        float values[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) values[j] = load(first + j * step);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) visit(first + j * step, values[j]);
    }
    for (; first < end; first += step) visit(first, load(first));
}

// A float's bits, so that larger floats are larger integers, and equal ones (0 and -0) are equal.
__device__ inline unsigned ordered_bits(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline Key key_of(float score, int candidate, int label, int num_classes) {
    const unsigned number = static_cast<unsigned>(candidate) * num_classes + label;
    return static_cast<Key>(ordered_bits(score)) << 32 | ~number;
}

__device__ inline float score_of(Key key) {
    const unsigned bits = static_cast<unsigned>(key >> 32);
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

__device__ inline unsigned number_of(Key key) {
    return ~static_cast<unsigned>(key);
}

// Score of a class of a candidate, from its class value and its objectness. `values` are raw; with a softmax, probabilities.
__device__ inline float combined(const Settings& s, float value, float objectness) {
    if (s.objectness[0] == 0) return value;
    if (s.activation == ACTIVATION_SIGMOID) value = sigmoid(value);
    if (s.objectness_weight < 0) return value * objectness;
    return powf(fmaxf(value, 0.0f), 1.0f - s.objectness_weight) * powf(fmaxf(objectness, 0.0f), s.objectness_weight);
}

// ---- Boxes.

struct Box {
    float v[5];  // xyxy in pixels; oriented: cx, cy, w, h in pixels and the angle in radians
};

// Where a candidate stands. They are numbered by level, anchor, row, column.
struct Place {
    float x, y, stride;  // column, row, pixels
    int slot;            // level * anchors + anchor
};

__device__ inline Place locate(const Settings& s, int candidate, int height, int width) {
    int level = 0, columns = 1, cells = 1;
    for (;; ++level) {
        const int stride = s.strides[level];
        columns = (width + stride - 1) / stride;
        cells = columns * ((height + stride - 1) / stride);
        if (level == s.levels - 1 || candidate < cells * s.anchors) break;
        candidate -= cells * s.anchors;
    }
    const int anchor = candidate / cells, cell = candidate % cells;
    Place place;
    place.x = static_cast<float>(cell % columns), place.y = static_cast<float>(cell / columns);
    place.stride = static_cast<float>(s.strides[level]), place.slot = level * s.anchors + anchor;
    return place;
}

// One of the four distances, in units of the stride: the mean over its bins.
template <typename T>
__device__ __noinline__ float distance_of(const Settings& s, const T* boxes, int candidates, int image, int candidate, int side) {
    if (s.bins == 1) return channel(boxes, s.boxes, candidates, image, candidate, side);
    if (s.bins == BINS_AT_ONCE) {
        float values[BINS_AT_ONCE], most = -infinity(), sum = 0.0f, mean = 0.0f;
#pragma unroll
        for (int i = 0; i < BINS_AT_ONCE; ++i)
            values[i] = channel(boxes, s.boxes, candidates, image, candidate, side * BINS_AT_ONCE + i);
#pragma unroll
        for (int i = 0; i < BINS_AT_ONCE; ++i) most = fmaxf(most, values[i]);
#pragma unroll
        for (int i = 0; i < BINS_AT_ONCE; ++i) {
            const float weight = expf(values[i] - most);
            sum += weight, mean += weight * s.values[i];
        }
        return mean / sum;
    }
    const auto each_bin = [&](auto visit) {
        visit_each<BINS_AT_ONCE>(
            0, s.bins, 1, [&](int i) { return channel(boxes, s.boxes, candidates, image, candidate, side * s.bins + i); }, visit);
    };
    float most = -infinity(), sum = 0.0f, mean = 0.0f;
    each_bin([&](int, float value) { most = fmaxf(most, value); });
    each_bin([&](int i, float value) {
        const float weight = expf(value - most);
        sum += weight, mean += weight * s.values[i];
    });
    return mean / sum;
}

// A candidate's box. `distances` are its four, where the head has distances.
template <typename T>
__device__ __noinline__ Box decode(
    const Settings& s, const T* boxes, const T* angles, const float* distances, int candidates, int image, int candidate, int height,
    int width) {
    float t[4];
    const bool has_distances = s.decode == DISTANCES, oriented = s.angle[0] != 0;
    for (int i = 0; i < 4; ++i) t[i] = has_distances ? distances[i] : channel(boxes, s.boxes, candidates, image, candidate, i);
    float turn = 0.0f;
    if (oriented) {
        turn = channel(angles, s.angle, candidates, image, candidate, 0);
        if (s.angle_sigmoid) turn = (sigmoid(turn) - 0.25f) * PI;
    }
    Box box;
    float* v = box.v;
    v[4] = turn;
    Place place = {0.0f, 0.0f, 1.0f, 0};
    if (s.decode > DECODED_CXCYWH) place = locate(s, candidate, height, width);
    float cx, cy, w, h;
    if (has_distances) {
        const float x = place.x + s.point, y = place.y + s.point;
        if (!oriented) {
            v[0] = (x - t[0]) * place.stride, v[1] = (y - t[1]) * place.stride;
            v[2] = (x + t[2]) * place.stride, v[3] = (y + t[3]) * place.stride;
        } else {  // taken along the sides of the turned box
            const float along = (t[2] - t[0]) * 0.5f, across = (t[3] - t[1]) * 0.5f, sine = sinf(turn), cosine = cosf(turn);
            v[0] = (along * cosine - across * sine + x) * place.stride, v[1] = (along * sine + across * cosine + y) * place.stride;
            v[2] = (t[0] + t[2]) * place.stride, v[3] = (t[1] + t[3]) * place.stride;
        }
    } else if (s.decode == DECODED_XYXY || oriented) {
        v[0] = t[0], v[1] = t[1], v[2] = t[2], v[3] = t[3];
    } else {
        if (s.decode == DECODED_CXCYWH) {
            cx = t[0], cy = t[1], w = t[2], h = t[3];
        } else if (s.decode == ANCHOR_BOXES) {
            const float wide = 2.0f * sigmoid(t[2]), tall = 2.0f * sigmoid(t[3]);
            cx = (2.0f * sigmoid(t[0]) - 0.5f + place.x) * place.stride, cy = (2.0f * sigmoid(t[1]) - 0.5f + place.y) * place.stride;
            w = wide * wide * s.anchor_sizes[2 * place.slot], h = tall * tall * s.anchor_sizes[2 * place.slot + 1];
        } else if (s.decode == GRID_OFFSETS) {
            cx = (t[0] + place.x) * place.stride, cy = (t[1] + place.y) * place.stride;
            w = expf(t[2]) * place.stride, h = expf(t[3]) * place.stride;
        } else {  // TANH_OFFSETS
            cx = (tanhf(t[0]) + place.x) * place.stride, cy = (tanhf(t[1]) + place.y) * place.stride;
            w = sigmoid(t[2]) * width, h = sigmoid(t[3]) * height;
        }
        v[0] = cx - w * 0.5f, v[1] = cy - h * 0.5f, v[2] = cx + w * 0.5f, v[3] = cy + h * 0.5f;
    }
    if (s.normalized) v[0] *= width, v[1] *= height, v[2] *= width, v[3] *= height;
    if (!oriented) {  // a negative size becomes zero, a NaN stays; a box too far out stays so, with a corner at -infinity too
        if (!(fabsf(v[0]) + fabsf(v[1]) + fabsf(v[2]) + fabsf(v[3]) < s.farthest)) v[0] = infinity();
        if (v[2] < v[0]) v[2] = v[0];
        if (v[3] < v[1]) v[3] = v[1];
    }
    return box;
}

// ---- select: grid (tiles, images), SELECT_THREADS threads.
//
// `keys` [images, candidates * (classes, if multi_label, else 1)] has for each tile the keys that pass, from the tile's place on;
// `counts` [images, tiles] says how many. `decoded` [images, candidates, 4 or 5] has the boxes of those that pass, and anything else of
// the others. Nothing has to be zero before.
//
// Each candidate has GROUPS threads, which share its classes. With channels first, threads beside each other read candidates beside
// each other; with channels last, the threads of a candidate stand beside each other.
template <typename T>
__device__ void select(
    const Settings& s, const T* classes, const T* objectness, const T* background, const T* boxes, const T* angles, int candidates,
    int height, int width, Key* keys, int* counts, float* decoded) {
    __shared__ float part_best[GROUPS][TILE], part_most[GROUPS][TILE], part_sum[GROUPS][TILE], distances[TILE][4];
    __shared__ int part_label[GROUPS][TILE], part_bad[GROUPS][TILE], passed[TILE], found;
    const int tile = blockIdx.x, image = blockIdx.y, thread = threadIdx.x;
    const bool rows = s.classes[0] == 2, softmax = s.activation == ACTIVATION_SOFTMAX;
    const int local = rows ? thread / GROUPS : thread % TILE, group = rows ? thread % GROUPS : thread / TILE;
    const int candidate = tile * TILE + local, count = s.num_classes;
    const int each = s.multi_label ? count : 1;
    Key* segment = keys + (static_cast<long long>(image) * candidates + static_cast<long long>(tile) * TILE) * each;
    if (thread == 0) found = 0;
    if (thread < TILE) passed[thread] = 0;

    bool open = candidate < candidates;
    float object = 1.0f;
    if (open && s.objectness[0] != 0) {
        object = channel(objectness, s.objectness, candidates, image, candidate, 0);
        if (s.activation == ACTIVATION_SIGMOID) {
            object = sigmoid(object);
            open = s.objectness_weight >= 0 || object > s.score_threshold;  // in a product, the other factor is at most 1
        }
    }

    // The best class of this thread's share, and with a softmax the largest value, which is subtracted before exponents are taken.
    const auto each_class = [&](auto visit) {
        visit_each<CLASSES_AT_ONCE>(
            group, count, GROUPS, [&](int c) { return channel(classes, s.classes, candidates, image, candidate, c); }, visit);
    };
    float best = -infinity(), most = -infinity();
    int label = 0, bad = 0;
    if (open && (softmax || !s.multi_label)) {
        each_class([&](int c, float value) {
            bad |= !usable(value);
            if (value > best || c == group) best = value, label = c;
        });
        most = best;
        if (softmax && group == 0 && s.background[0] != 0) {
            const float value = channel(background, s.background, candidates, image, candidate, 0);
            bad |= !usable(value);
            most = fmaxf(most, value);
        }
        part_best[group][local] = best, part_most[group][local] = most;
        part_label[group][local] = label, part_bad[group][local] = bad;
    }
    __syncthreads();

    float sum = 0.0f;
    if (open && (softmax || !s.multi_label)) {
        for (int g = 0; g < GROUPS; ++g) {
            if (g >= count) continue;  // a share without a class
            bad |= part_bad[g][local];
            most = fmaxf(most, part_most[g][local]);
            const float value = part_best[g][local];
            if (value > best || (value == best && part_label[g][local] < label)) best = value, label = part_label[g][local];
        }
        open = !bad;
        if (open && softmax) {
            each_class([&](int, float value) { sum += expf(value - most); });
            if (group == 0 && s.background[0] != 0)
                sum += expf(channel(background, s.background, candidates, image, candidate, 0) - most);
            part_sum[group][local] = sum;
        }
    }
    if (softmax) {
        __syncthreads();
        sum = 0.0f;
        for (int g = 0; g < GROUPS; ++g) sum += part_sum[g][local];
    }

    const auto judge = [&](int c, float value) {
        if (!usable(value)) return;
        if (softmax) value = expf(value - most) / sum;
        const float score = combined(s, value, object);
        if (!(score > s.score_threshold && usable(score))) return;
        segment[atomicAdd(&found, 1)] = key_of(score, candidate, c, count);
        passed[local] = 1;
    };
    if (open && s.multi_label) {
        each_class(judge);
    } else if (open && group == 0) {
        judge(label, best);
    }
    __syncthreads();
    if (thread == 0) counts[image * gridDim.x + tile] = found;
    if (found == 0) return;

    // Decode: a thread for each distance, then one for each candidate.
    if (s.decode == DISTANCES) {
        const int at = s.boxes[0] == 2 ? thread / 4 : thread % TILE, side = s.boxes[0] == 2 ? thread % 4 : thread / TILE;
        if (passed[at]) distances[at][side] = distance_of(s, boxes, candidates, image, tile * TILE + at, side);
        __syncthreads();
    }
    if (thread < TILE && passed[thread]) {
        const int size = s.angle[0] != 0 ? 5 : 4, at = tile * TILE + thread;
        const Box box = decode(s, boxes, angles, distances[thread], candidates, image, at, height, width);
        float* out = decoded + (static_cast<long long>(image) * candidates + at) * size;
        for (int k = 0; k < size; ++k) out[k] = box.v[k];
    }
}

// ---- suppress: grid (images), SUPPRESS_THREADS threads.

// What is needed of a box to compare it: upright x1, y1, x2, y2, area; oriented cx, cy, variances along and across, sine, cosine, and
// twice the root of the covariance's determinant (0 where the box is too thin to overlap anything). `Upright` and `Oriented` say how
// many numbers a box has, how many its shape, and whether the IoU of two is above the threshold; of oriented ones the probabilistic
// IoU. fusenms/backends/overlap.py has the formulas, which divide no close call and, oriented, sum only what is not negative.
struct Shape {
    float v[MOST_NUMBERS];
};

struct Upright {
    static constexpr int BOX = 4, NUMBERS = 5;
    static constexpr bool BOUNDED = true;  // boxes that share no point do not overlap, and the first four numbers are their corners

    __device__ static inline Shape shape(const Box& box) {
        const float* v = box.v;
        return {{v[0], v[1], v[2], v[3], (v[2] - v[0]) * (v[3] - v[1])}};
    }

    __device__ static inline bool overlap(const Shape& a, const Shape& b, float limit) {
        const float *u = a.v, *v = b.v;
        const float width = fmaxf(fminf(u[2], v[2]) - fmaxf(u[0], v[0]), 0.0f);
        const float height = fminf(u[3], v[3]) - fmaxf(u[1], v[1]);
        const float shared = width * height;
        return shared > (u[4] + v[4] - shared) * limit;
    }
};

struct Oriented {
    static constexpr int BOX = 5, NUMBERS = 7;
    static constexpr bool BOUNDED = false;

    __device__ __noinline__ static Shape shape(const Box& box) {
        const float* v = box.v;
        const bool thick = fminf(v[2], v[3]) > THINNEST;
        return {{v[0], v[1], v[2] * v[2] / 12.0f, v[3] * v[3] / 12.0f, sinf(v[4]), cosf(v[4]), thick ? v[2] * v[3] / 6.0f : 0.0f}};
    }

    __device__ static inline bool overlap(const Shape& a, const Shape& b, float limit) {
        const float *u = a.v, *v = b.v;
        const float dx = u[0] - v[0], dy = u[1] - v[1];
        const float along_u = dx * u[5] + dy * u[4], across_u = dy * u[5] - dx * u[4];
        const float along_v = dx * v[5] + dy * v[4], across_v = dy * v[5] - dx * v[4];
        const float apart =
            along_u * along_u * u[3] + across_u * across_u * u[2] + (along_v * along_v * v[3] + across_v * across_v * v[2]);
        const float sine = u[4] * v[5] - u[5] * v[4];
        const float parallel = u[2] * v[3] + u[3] * v[2], crossed = u[2] * v[2] + u[3] * v[3];
        const float determinant = u[2] * u[3] + v[2] * v[3] + (parallel + sine * sine * (crossed - parallel));
        const float distance = apart / determinant * 0.5f + logf(determinant / (u[6] * v[6]));
        return distance < limit;  // infinite, or NaN, where a box is too thin
    }
};

__device__ inline unsigned larger(unsigned bits, Key key) {
    const unsigned own = static_cast<unsigned>(key >> 32);
    return own > bits ? own : bits;
}

// What a block has of one image's keys, and how it goes through them.
struct Found {
    const Key* keys;
    const int* counts;
    int tiles, segment;  // keys that a tile has room for

    template <typename Visit>
    __device__ void each(Visit visit) const {
        for (int tile = threadIdx.x / READERS; tile < tiles; tile += SUPPRESS_THREADS / READERS) {
            const int count = counts[tile];
            for (int i = threadIdx.x % READERS; i < count; i += READERS) visit(keys[static_cast<long long>(tile) * segment + i]);
        }
    }

    // How many keys a tile has; a thread's tiles are `tile_of(0)`, `tile_of(1)`, …
    __device__ int count_of(int tile) const {
        return tile < tiles ? counts[tile] : 0;
    }

    __device__ int tile_of(int i) const {
        return (i * SUPPRESS_THREADS + threadIdx.x) / READERS;
    }

    // Add all keys to `run`, as far as there is room for them, and their number to `filled`. `count` is that of this thread's first tile.
    // Returns the best score's bits, of those that this thread saw.
    __device__ unsigned gather(Key* run, int* filled, int count) const {
        const int reader = threadIdx.x % READERS;
        unsigned highest = 0;
        for (int i = 0; i * SUPPRESS_THREADS / READERS < tiles; ++i) {
            const int tile = tile_of(i);
            if (i > 0) count = count_of(tile);
            int at = reader == 0 && count ? atomicAdd(filled, count) : 0;
            at = __shfl_sync(EVERY_LANE, at, threadIdx.x % 32 - reader);
#pragma unroll 4
            for (int k = reader; k < count && at + k < RUN; k += READERS) {
                const Key key = keys[static_cast<long long>(tile) * segment + k];
                run[at + k] = key, highest = larger(highest, key);
            }
        }
        return highest;
    }
};

// Note the best score's bits of a warp.
__device__ inline void note_highest(unsigned highest, unsigned* best) {
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        const unsigned other = __shfl_xor_sync(EVERY_LANE, highest, step);
        if (other > highest) highest = other;
    }
    if (threadIdx.x % 32 == 0) atomicMax(best, highest);
}

// A warp decides on `here` candidates, best first, of which `rivals` says, 32 a word, which of the better ones would suppress them. In
// each round one is kept whose rivals are all settled and none kept, and settled that has a rival that is kept: mostly all at once.
__device__ inline void decide(const unsigned (&rivals)[WORDS][CHUNK], int here, unsigned* keep) {
    const int lane = threadIdx.x % 32;
    unsigned against[WORDS][WORDS], open[WORDS], kept[WORDS];
#pragma unroll
    for (int q = 0; q < WORDS; ++q) {
        const int left = here - 32 * q;
        open[q] = left >= 32 ? EVERY_LANE : left > 0 ? (1u << left) - 1u : 0u, kept[q] = 0;
#pragma unroll
        for (int w = 0; w <= q; ++w) against[q][w] = rivals[w][32 * q + lane];
    }
    while (open[0] | open[1] | open[2] | open[3]) {
#pragma unroll
        for (int q = 0; q < WORDS; ++q) {
            if (open[q] == 0) continue;
            const bool mine = open[q] >> lane & 1u;
            unsigned hit = 0, unsettled = 0;
#pragma unroll
            for (int w = 0; w <= q; ++w) hit |= against[q][w] & kept[w], unsettled |= against[q][w] & open[w];
            const unsigned stays = __ballot_sync(EVERY_LANE, mine && !hit && !unsettled);
            const unsigned goes = __ballot_sync(EVERY_LANE, mine && hit);
            open[q] &= ~(stays | goes), kept[q] |= stays;
        }
    }
    static_assert(WORDS == 4, "open words are counted by hand");
#pragma unroll
    for (int q = 0; q < WORDS; ++q) keep[q] = kept[q];  // the same from every lane
}

// The key of which `wanted` are not below it, among the keys below `bound`; there are more than `wanted` of those. Digit by digit, the
// highest first.
__device__ inline Key nth_key(const Found& found, Key bound, int wanted) {
    __shared__ int histogram[256];
    __shared__ int digit, taken, exact;
    Key prefix = 0, mask = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += SUPPRESS_THREADS) histogram[i] = 0;
        __syncthreads();
        found.each([&](Key key) {
            if (key < bound && (key & mask) == prefix) atomicAdd(&histogram[key >> shift & 255], 1);
        });
        __syncthreads();
        if (threadIdx.x < 256) {
            int above = 0;
            for (int i = threadIdx.x + 1; i < 256; ++i) above += histogram[i];
            const int here = histogram[threadIdx.x];
            if (above < wanted && wanted <= above + here) digit = threadIdx.x, taken = above, exact = wanted == above + here;
        }
        __syncthreads();
        prefix |= static_cast<Key>(digit) << shift, mask |= static_cast<Key>(255) << shift;
        wanted -= taken;
        if (exact) break;  // all of this digit are wanted
    }
    return prefix;
}

// Sort `size` keys (a power of two), the largest first: a bitonic network. Pairs that are at most 32 apart stay within the 64 keys of a
// warp, which then waits for itself only.
__device__ inline void sort_by_pairs(Key* keys, int size) {
#pragma unroll 1
    for (int length = 2; length <= size; length <<= 1) {
#pragma unroll 1
        for (int apart = length >> 1; apart > 0; apart >>= 1) {
            for (int i = threadIdx.x; i < size / 2; i += SUPPRESS_THREADS) {
                const int low = 2 * i - (i & (apart - 1)), high = low + apart;
                const Key a = keys[low], b = keys[high];
                if ((a < b) == ((low & length) == 0)) keys[low] = b, keys[high] = a;
            }
            const int next = apart > 1 ? apart >> 1 : length;
            if (apart > 32 || next > 32) {
                __syncthreads();
            } else {
                __syncwarp();
            }
        }
    }
}

// Sort `size` keys (at most RUN), the largest first: by score into buckets between `least` and `most`, then by comparing those of a
// bucket. Where one bucket has too many, since scores are equal or one is far away, by pairs. `histogram` is zero before.
__device__ inline void sort(Key* keys, int* histogram, int size, float least, float most) {
    __shared__ int totals[WARPS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    least = fmaxf(least, most - 32.0f);  // a threshold of -infinity, say
    const float scale = most - least > 1e-6f ? BUCKETS / (most - least) : 0.0f;
    Key own[OWN];
    unsigned place[OWN];  // bucket and number in it; then where the bucket starts and how many it has; then the place of the key
#pragma unroll
    for (int q = 0; q < OWN; ++q) {
        const int i = thread + q * SUPPRESS_THREADS;
        if (i >= size) break;
        own[q] = keys[i];
        const int bucket = static_cast<int>(fminf((most - score_of(own[q])) * scale, BUCKETS - 1.0f));
        place[q] = static_cast<unsigned>(bucket) << 16 | static_cast<unsigned>(atomicAdd(&histogram[bucket], 1));
    }
    __syncthreads();
    const int count = histogram[thread];
    if (__syncthreads_or(count > CROWDED)) {
        int padded = 2;
        while (padded < size) padded <<= 1;
        for (int i = size + thread; i < padded; i += SUPPRESS_THREADS) keys[i] = 0;
        __syncthreads();
        sort_by_pairs(keys, padded);
        __syncthreads();
        return;
    }
    int sum = count;  // of this bucket and those before it in the warp
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        const int before = __shfl_up_sync(EVERY_LANE, sum, step);
        if (lane >= step) sum += before;
    }
    if (lane == 31) totals[warp] = sum;
    __syncthreads();
    int first = lane < warp ? totals[lane] : 0;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) first += __shfl_xor_sync(EVERY_LANE, first, step);
    first += sum - count;
    static_assert(CROWDED < 256 && RUN <= 1 << 16, "a count has a byte, a number two");
    histogram[thread] = first << 8 | count;
    __syncthreads();
#pragma unroll
    for (int q = 0; q < OWN; ++q) {
        if (thread + q * SUPPRESS_THREADS >= size) break;
        const unsigned start = static_cast<unsigned>(histogram[place[q] >> 16]);
        keys[(start >> 8) + (place[q] & 0xffffu)] = own[q];
        place[q] = start;
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < OWN; ++q) {
        if (thread + q * SUPPRESS_THREADS >= size) break;
        const unsigned begin = place[q] >> 8, end = begin + (place[q] & 255u);
        place[q] = begin;
#pragma unroll 1
        for (unsigned i = begin; i < end; ++i) place[q] += keys[i] > own[q];
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < OWN; ++q) {
        if (thread + q * SUPPRESS_THREADS >= size) break;
        keys[place[q]] = own[q];
    }
    __syncthreads();
}

// Cells of 128 pixels that an interval touches, a bit for each; there are CELLS, which come again and again. Intervals that share a point
// share a cell.
__device__ inline unsigned cells_of(float low, float high) {
    const int first = static_cast<int>(floorf(fmaxf(fminf(low, 1e6f), -1e6f) / CELL));
    const int last = static_cast<int>(floorf(fmaxf(fminf(high, 1e6f), -1e6f) / CELL));
    if (last - first >= CELLS - 1) return EVERY_LANE;
    const unsigned bits = (2u << (last - first)) - 1u, turn = first & (CELLS - 1);
    return bits << turn | (turn ? bits >> (CELLS - turn) : 0u);
}

// Where a box is and what: boxes that overlap and are compared have a bit of each in common.
struct Mask {
    unsigned columns, rows, label;
};

template <typename Kind>
__device__ inline Mask mask_of(const Shape& shape, int label) {
    const unsigned kind = 1u << label % CELLS;
    if (!Kind::BOUNDED) return {EVERY_LANE, EVERY_LANE, kind};
    return {cells_of(shape.v[0], shape.v[2]), cells_of(shape.v[1], shape.v[3]), kind};
}

// Bit j of lane i goes to bit i of lane j.
__device__ inline unsigned transposed(unsigned bits) {
    unsigned mask = 0x0000ffffu;  // of the bits that a lane without bit `apart` keeps
#pragma unroll
    for (int apart = 16; apart > 0; apart >>= 1) {
        const unsigned other = __shfl_xor_sync(EVERY_LANE, bits, apart);
        bits = threadIdx.x & apart ? (bits & ~mask) | (other & ~mask) >> apart : (bits & mask) | (other & mask) << apart;
        mask ^= mask << (apart >> 1);
    }
    return bits;
}

// Which of the kept rows touch a column of cells, a row of cells, or have a label (modulo CELLS): a bit for each row.
struct Index {
    unsigned columns[ROW_WORDS][CELLS], rows[ROW_WORDS][CELLS], labels[ROW_WORDS][CELLS];

    __device__ void clear() {
        for (int i = threadIdx.x; i < ROW_WORDS * CELLS; i += SUPPRESS_THREADS)
            (&columns[0][0])[i] = 0, (&rows[0][0])[i] = 0, (&labels[0][0])[i] = 0;
    }

    // Add rows `first` to `end`, of which `masks` are in order: a warp for 32 rows, all of the block's take part.
    __device__ void add(const Mask* masks, int first, int end) {
        const int lane = threadIdx.x % 32;
        end = end < INDEXED ? end : INDEXED;
        for (int word = first / 32 + threadIdx.x / 32; word * 32 < end; word += WARPS) {
            const int row = word * 32 + lane;
            const bool is_new = row >= first && row < end;
            const Mask mask = is_new ? masks[row - first] : Mask{0u, 0u, 0u};
            columns[word][lane] |= transposed(mask.columns);
            rows[word][lane] |= transposed(mask.rows);
            labels[word][lane] |= transposed(mask.label);
        }
    }

    // Those of 32 rows that a box may overlap.
    __device__ unsigned near(int word, const Mask& mask) const {
        unsigned found = labels[word][__ffs(static_cast<int>(mask.label)) - 1];
        if (__popc(found) <= FEW) return found;
        unsigned touched = 0;
#pragma unroll 1
        for (unsigned left = mask.columns; left; left &= left - 1) touched |= columns[word][__ffs(static_cast<int>(left)) - 1];
        found &= touched, touched = 0;
        if (__popc(found) <= FEW) return found;
#pragma unroll 1
        for (unsigned left = mask.rows; left; left &= left - 1) touched |= rows[word][__ffs(static_cast<int>(left)) - 1];
        return found & touched;
    }
};

template <typename Kind>
__device__ inline Box read_box(const float* decoded, int candidate) {
    Box box = {};
    for (int k = 0; k < Kind::BOX; ++k) box.v[k] = decoded[static_cast<long long>(candidate) * Kind::BOX + k];
    return box;
}

// Shape number i of `stride` shapes, whose k-th numbers stand side by side.
template <typename Kind>
__device__ inline Shape read_shape(const float* shapes, int stride, int i) {
    Shape shape;
    for (int k = 0; k < Kind::NUMBERS; ++k) shape.v[k] = shapes[k * stride + i];
    return shape;
}

// Outputs: counts [images, 1], boxes [images, max_detections, 4 or 5], scores, labels and indices [images, max_detections], all blank
// (0, of labels and indices -1) past the count. `kept` [images, MOST_NUMBERS, max_detections] is for its own use.
template <typename Kind>
__device__ void suppress(
    const Settings& s, const Key* keys, const int* counts, const float* decoded, int candidates, int* out_count, float* out_boxes, float* out_scores, int* out_labels, int* out_indices, float* kept_shapes) {
    __shared__ Key run[RUN];
    __shared__ union {
        int histogram[BUCKETS];
        struct {
            float shapes[MOST_NUMBERS][CHUNK];
            int labels[CHUNK];
        } chunk;
    } scratch;
    __shared__ Index index;  // of kept rows
    __shared__ Mask masks[CHUNK];
    __shared__ unsigned rivals[WORDS][CHUNK], alive[WARPS], keep[WORDS], best;
    __shared__ int filled;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, image = blockIdx.x;
    const int tiles = (candidates + TILE - 1) / TILE, each = s.multi_label ? s.num_classes : 1, most = s.max_detections;
    const Found found = {keys + static_cast<long long>(image) * candidates * each, counts + image * tiles, tiles, TILE * each};
    decoded += static_cast<long long>(image) * candidates * Kind::BOX;
    out_labels += static_cast<long long>(image) * most;
    kept_shapes += static_cast<long long>(image) * most * MOST_NUMBERS;

    // All keys, in any order, as far as there is room for them; how many there are; the best score's bits.
    const int ahead = found.count_of(found.tile_of(0));
    if (thread == 0) filled = 0, best = 0;
    scratch.histogram[thread] = 0;
    index.clear();
    __syncthreads();
    unsigned highest = found.gather(run, &filled, ahead);
    note_highest(highest, &best);
    __syncthreads();
    const int total = filled, last = total < s.max_candidates ? total : s.max_candidates;

    int kept = 0;
    Key bound = ~static_cast<Key>(0);
    for (int done = 0; done < last && kept < most;) {
        int size = total;
        if (total > RUN) {  // the next of them, at most RUN
            size = last - done < RUN ? last - done : RUN;
            const Key lowest = size < total - done ? nth_key(found, bound, size) : 0;
            __syncthreads();
            if (thread == 0) filled = 0, best = 0;
            scratch.histogram[thread] = 0;
            __syncthreads();
            highest = 0;
            found.each([&](Key key) {
                if (!(key < bound && key >= lowest)) return;
                run[atomicAdd(&filled, 1)] = key;
                highest = larger(highest, key);
            });
            note_highest(highest, &best);
            __syncthreads();
        }
        sort(run, scratch.histogram, size, s.score_threshold, score_of(static_cast<Key>(best) << 32));
        const int take = size < last - done ? size : last - done;

        // A thread for each of SUPPRESS_THREADS candidates.
        for (int start = 0; start < take && kept < most; start += SUPPRESS_THREADS) {
            bool open = start + thread < take;
            int compared = 0, waiting;
            do {
                // Read anew in each round: 64 registers a thread are too few to keep it while the chunk is decided.
                Key key = 0;
                Shape own = {};
                if (open) {
                    key = run[start + thread];
                    const Box box = read_box<Kind>(decoded, static_cast<int>(number_of(key) / s.num_classes));
                    float reach = 0.0f;
                    for (int k = 0; k < Kind::BOX; ++k) reach += fabsf(box.v[k]);
                    open = reach < s.farthest;  // false for NaN
                    own = Kind::shape(box);
                }
                const int label = s.class_agnostic ? 0 : static_cast<int>(number_of(key) % s.num_classes);
                // What was kept since the last time settles whom it suppresses.
                const Mask mask = mask_of<Kind>(own, label);
                const int indexed = kept < INDEXED ? kept : INDEXED;
#pragma unroll 1
                for (int word = compared / 32; open && word * 32 < indexed; ++word) {
                    unsigned near = index.near(word, mask);
                    if (word == compared / 32) near &= EVERY_LANE << compared % 32;
#pragma unroll 1
                    for (; open && near; near &= near - 1) {
                        const int j = word * 32 + __ffs(static_cast<int>(near)) - 1;
                        open = !((s.class_agnostic || out_labels[j] == label) &&
                                 Kind::overlap(own, read_shape<Kind>(kept_shapes, most, j), s.overlap_limit));
                    }
                }
#pragma unroll 1
                for (int j = compared < INDEXED ? INDEXED : compared; open && j < kept; ++j)
                    open = !((s.class_agnostic || out_labels[j] == label) &&
                             Kind::overlap(own, read_shape<Kind>(kept_shapes, most, j), s.overlap_limit));
                compared = kept;

                // The best that are open, at most CHUNK, make a chunk.
                const unsigned beside = __ballot_sync(EVERY_LANE, open);
                if (lane == 0) alive[warp] = beside;
                __syncthreads();
                const int theirs = __popc(alive[lane]);
                int both = theirs | (lane < warp ? theirs << 16 : 0);
#pragma unroll
                for (int step = 1; step < 32; step <<= 1) both += __shfl_xor_sync(EVERY_LANE, both, step);
                waiting = both & 0xffff;
                if (waiting == 0) break;
                const int place = (both >> 16) + __popc(beside & ((1u << lane) - 1u)), here = waiting < CHUNK ? waiting : CHUNK;
                const bool member = open && place < CHUNK;
                if (member) {
                    for (int k = 0; k < Kind::NUMBERS; ++k) scratch.chunk.shapes[k][place] = own.v[k];
                    scratch.chunk.labels[place] = label;
                    masks[place] = mask;
                    open = false;
                }
                __syncthreads();

                // Who would suppress whom in it: a thread for 32 of the better ones of each.
                if (thread < CHUNK * WORDS) {
                    const int i = thread % CHUNK, word = thread / CHUNK;
                    unsigned hits = 0;
                    if (i < here && word <= i / 32) {
                        const Mask mine = masks[i];
                        unsigned near = 0;
#pragma unroll 4
                        for (int bit = 0; bit < 32; ++bit) {
                            const Mask other = masks[word * 32 + bit];
                            if ((mine.label & other.label) && (mine.columns & other.columns) && (mine.rows & other.rows)) near |= 1u << bit;
                        }
                        if (word == i / 32) near &= (1u << i % 32) - 1u;
                        const Shape shape = read_shape<Kind>(&scratch.chunk.shapes[0][0], CHUNK, i);
#pragma unroll 1
                        for (; near; near &= near - 1) {
                            const int bit = __ffs(static_cast<int>(near)) - 1, j = word * 32 + bit;
                            if (scratch.chunk.labels[j] == scratch.chunk.labels[i] &&
                                Kind::overlap(shape, read_shape<Kind>(&scratch.chunk.shapes[0][0], CHUNK, j), s.overlap_limit))
                                hits |= 1u << bit;
                        }
                    }
                    rivals[word][i] = hits;
                }
                __syncthreads();
                if (warp == 0) decide(rivals, here, keep);
                __syncthreads();

                // Write the rows.
                int row = kept, after = kept;
                for (int word = 0; word < WORDS; ++word) {
                    const unsigned mask = word < place / 32 ? EVERY_LANE : word == place / 32 ? (1u << place % 32) - 1u : 0u;
                    row += __popc(keep[word] & mask), after += __popc(keep[word]);
                }
                if (member && (keep[place / 32] >> place % 32 & 1u) && row < most) {
                    const Key mine = run[start + thread];
                    const float score = score_of(mine);
                    const bool logit = s.activation == ACTIVATION_SIGMOID && s.objectness[0] == 0;
                    const int candidate = static_cast<int>(number_of(mine) / s.num_classes);
                    const Box box = read_box<Kind>(decoded, candidate);
                    const long long at = static_cast<long long>(image) * most + row;
                    for (int k = 0; k < Kind::BOX; ++k) out_boxes[at * Kind::BOX + k] = box.v[k];
                    for (int k = 0; k < Kind::NUMBERS; ++k) kept_shapes[k * most + row] = scratch.chunk.shapes[k][place];
                    out_scores[at] = logit ? sigmoid(score) : score;
                    out_labels[row] = static_cast<int>(number_of(mine) % s.num_classes);
                    out_indices[at] = candidate;
                    masks[row - kept] = mask_of<Kind>(read_shape<Kind>(&scratch.chunk.shapes[0][0], CHUNK, place), scratch.chunk.labels[place]);
                }
                after = after < most ? after : most;
                __syncthreads();
                if (start + SUPPRESS_THREADS < take || waiting > CHUNK || done + take < last) {  // there is more to compare with it
                    index.add(masks, kept, after);
                    __syncthreads();
                }
                kept = after;
            } while (waiting > CHUNK && kept < most);
            __syncthreads();
        }
        done += take;
        bound = run[take - 1];
        __syncthreads();
    }

    if (thread == 0) out_count[image] = kept;
    for (int i = kept + thread; i < most; i += SUPPRESS_THREADS) {
        const long long at = static_cast<long long>(image) * most + i;
        for (int k = 0; k < Kind::BOX; ++k) out_boxes[at * Kind::BOX + k] = 0.0f;
        out_scores[at] = 0.0f, out_labels[i] = -1, out_indices[at] = -1;
    }
}

}  // namespace fusenms

// ---- The kernels. Their arguments stand as TensorRT gives them to a kernel that it carries in an engine: inputs, numbers, outputs.
//
// Either the settings are an argument, or they are built in (fusenms/engines/plugin.py): then FUSENMS_BAKED are their words,
// FUSENMS_ELEMENT the type of the head's numbers, FUSENMS_KIND Upright or Oriented; and there is an argument more, the picture, which
// TensorRT has to be given for its size.

#define FUSENMS_SELECT(T, source, name)                                                                                           \
    extern "C" __global__ void __launch_bounds__(fusenms::SELECT_THREADS, fusenms::SELECT_BLOCKS) name(                                                 \
        FUSENMS_ARGUMENT const T* classes, const T* objectness, const T* background, const T* boxes, const T* angles, FUSENMS_PICTURE \
        int candidates, int height, int width, fusenms::Key* keys, int* counts, float* decoded) {                                  \
        fusenms::select(                                                                                                           \
            source, classes, objectness, background, boxes, angles, candidates, height, width, keys, counts, decoded);             \
    }
#define FUSENMS_SUPPRESS(Kind, source, name)                                                                                      \
    extern "C" __global__ void __launch_bounds__(fusenms::SUPPRESS_THREADS, 1) name(                                               \
        FUSENMS_ARGUMENT const fusenms::Key* keys, const int* found, const float* decoded, int candidates, int* count,             \
        float* out_boxes, float* scores, int* labels, int* indices, float* kept) {                                                 \
        fusenms::suppress<fusenms::Kind>(                                                                                          \
            source, keys, found, decoded, candidates, count, out_boxes, scores, labels, indices, kept);                            \
    }

#ifdef FUSENMS_BAKED
#define FUSENMS_ARGUMENT
#define FUSENMS_PICTURE const void *picture,
__constant__ const int fusenms_baked[] = {FUSENMS_BAKED};
static_assert(sizeof fusenms_baked == sizeof(fusenms::Settings), "the settings are of another version");
FUSENMS_SELECT(FUSENMS_ELEMENT, *reinterpret_cast<const fusenms::Settings*>(fusenms_baked), fused_nms_select)
FUSENMS_SUPPRESS(FUSENMS_KIND, *reinterpret_cast<const fusenms::Settings*>(fusenms_baked), fused_nms_suppress)
#else
#define FUSENMS_ARGUMENT const __grid_constant__ fusenms::Settings settings,
#define FUSENMS_PICTURE
FUSENMS_SELECT(float, settings, fused_nms_select_float)
FUSENMS_SELECT(fusenms::Half, settings, fused_nms_select_half)
FUSENMS_SUPPRESS(Upright, settings, fused_nms_suppress_upright)
FUSENMS_SUPPRESS(Oriented, settings, fused_nms_suppress_oriented)
#endif
