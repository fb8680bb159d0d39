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

constexpr int SELECT_THREADS = 256, TILE = 64, GROUPS = SELECT_THREADS / TILE;  // candidates of a block, threads of a candidate
static_assert(GROUPS == 4, "a candidate has a thread for each of four distances");
constexpr int SUPPRESS_THREADS = 1024, WARPS = SUPPRESS_THREADS / 32;
constexpr int RUN = 4096;         // keys that are sorted at once
constexpr int CHUNK = 128, WORDS = CHUNK / 32;  // candidates that are decided at once
constexpr int EACH = CHUNK / WARPS;             // of them, those of a warp
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
    if (s.activation == ACTIVATION_SIGMOID) return sigmoid(value) * objectness;
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
            open = object > s.score_threshold;  // the other factor is at most 1
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
};

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
__device__ inline void sort(Key* keys, int size) {
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
    __syncthreads();
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
    __shared__ float chunk_boxes[5][CHUNK], chunk_shapes[MOST_NUMBERS][CHUNK];
    __shared__ int chunk_labels[CHUNK], filled;
    __shared__ unsigned rivals[CHUNK][WORDS], alive[WORDS], keep[WORDS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, image = blockIdx.x;
    const int tiles = (candidates + TILE - 1) / TILE, each = s.multi_label ? s.num_classes : 1, most = s.max_detections;
    const Found found = {keys + static_cast<long long>(image) * candidates * each, counts + image * tiles, tiles, TILE * each};
    decoded += static_cast<long long>(image) * candidates * Kind::BOX;
    out_boxes += static_cast<long long>(image) * most * Kind::BOX, out_scores += static_cast<long long>(image) * most;
    out_labels += static_cast<long long>(image) * most, out_indices += static_cast<long long>(image) * most;
    kept_shapes += static_cast<long long>(image) * most * MOST_NUMBERS;

    if (thread == 0) filled = 0;
    __syncthreads();
    int total = 0;
    for (int i = thread; i < tiles; i += SUPPRESS_THREADS) total += found.counts[i];
    if (total) atomicAdd(&filled, total);
    __syncthreads();
    total = filled;

    int kept = 0, done = 0;
    Key bound = ~static_cast<Key>(0);
    const int last = total < s.max_candidates ? total : s.max_candidates;
    while (done < last && kept < most) {
        // The next keys, at most RUN of them, in order.
        const int take = last - done < RUN ? last - done : RUN;
        const Key lowest = take < total - done ? nth_key(found, bound, take) : 0;
        int size = 2;
        while (size < take) size <<= 1;
        __syncthreads();
        if (thread == 0) filled = 0;
        for (int i = thread; i < size; i += SUPPRESS_THREADS) run[i] = 0;
        __syncthreads();
        found.each([&](Key key) {
            if (key < bound && key >= lowest) run[atomicAdd(&filled, 1)] = key;
        });
        __syncthreads();
        sort(run, size);

        // A thread for each candidate of a chunk reads its box while the chunk before is decided.
        Box ahead = {};
        const auto read_ahead = [&](int i) {
            if (thread >= CHUNK || i >= take) return;
            const float* numbers = decoded + static_cast<long long>(number_of(run[i]) / s.num_classes) * Kind::BOX;
            for (int k = 0; k < Kind::BOX; ++k) ahead.v[k] = numbers[k];
        };
        read_ahead(thread);
        for (int start = 0; start < take && kept < most; start += CHUNK) {
            const int here = take - start < CHUNK ? take - start : CHUNK;
            if (thread < CHUNK) {
                bool valid = false;
                if (thread < here) {
                    const unsigned number = number_of(run[start + thread]);
                    const Box box = ahead;
                    const Shape shape = Kind::shape(box);
                    float reach = 0.0f;
                    for (int k = 0; k < Kind::BOX; ++k) chunk_boxes[k][thread] = box.v[k], reach += fabsf(box.v[k]);
                    for (int k = 0; k < Kind::NUMBERS; ++k) chunk_shapes[k][thread] = shape.v[k];
                    chunk_labels[thread] = s.class_agnostic ? 0 : static_cast<int>(number % s.num_classes);
                    valid = reach < s.farthest;  // false for NaN
                }
                const unsigned valid_lanes = __ballot_sync(EVERY_LANE, valid);
                if (lane == 0) alive[warp] = valid_lanes;
            }
            read_ahead(start + CHUNK + thread);
            __syncthreads();

            // Who suppresses whom: candidates of the chunk by what was kept, which settles them, and by each other, which is noted.
#pragma unroll 1
            for (int i = warp * EACH; i < warp * EACH + EACH && i < here; ++i) {
                const Shape own = read_shape<Kind>(&chunk_shapes[0][0], CHUNK, i);
                const int label = chunk_labels[i];
                bool gone = false;
#pragma unroll 1
                for (int first = 0; first < kept && !gone; first += 32) {
                    const int j = first + lane;
                    bool hit = j < kept && (s.class_agnostic || out_labels[j] == label);
                    if (hit) hit = Kind::overlap(own, read_shape<Kind>(kept_shapes, most, j), s.overlap_limit);
                    gone = __any_sync(EVERY_LANE, hit);
                }
                if (gone) {
                    if (lane == 0) atomicAnd(&alive[i / 32], ~(1u << i % 32));
                    continue;
                }
#pragma unroll 1
                for (int word = 0; word <= i / 32; ++word) {
                    const int j = word * 32 + lane;
                    bool hit = j < i && chunk_labels[j] == label;
                    if (hit) hit = Kind::overlap(own, read_shape<Kind>(&chunk_shapes[0][0], CHUNK, j), s.overlap_limit);
                    const unsigned hits = __ballot_sync(EVERY_LANE, hit);
                    if (lane == 0) rivals[i][word] = hits;
                }
            }
            __syncthreads();

            // Decide, best first, 32 at a time: the best that is open is kept, and settles those that it suppresses.
            if (warp == 0) {
                for (int word = 0; word < WORDS; ++word) {
                    const int i = word * 32 + lane;
                    bool open = i < here && (alive[word] >> lane & 1u);
                    for (int w = 0; w < word; ++w)
                        if (open && (rivals[i][w] & keep[w])) open = false;
                    const unsigned own = open ? rivals[i][word] : 0u;
                    unsigned decided = 0u;
                    for (unsigned waiting = __ballot_sync(EVERY_LANE, open); waiting; waiting = __ballot_sync(EVERY_LANE, open)) {
                        const int next = __ffs(static_cast<int>(waiting)) - 1;
                        decided |= 1u << next;
                        if (lane == next || (own >> next & 1u)) open = false;
                    }
                    keep[word] = decided;  // the same in every lane, each of which reads what it wrote
                }
            }
            __syncthreads();

            // Write the rows.
            int before = kept, after = kept;
            for (int word = 0; word < WORDS; ++word) {
                const unsigned mask = word < thread / 32 ? EVERY_LANE : word == thread / 32 ? (1u << thread % 32) - 1u : 0u;
                before += __popc(keep[word] & mask), after += __popc(keep[word]);
            }
            if (thread < here && (keep[thread / 32] >> thread % 32 & 1u) && before < most) {
                const Key key = run[start + thread];
                const float score = score_of(key);
                const bool logit = s.activation == ACTIVATION_SIGMOID && s.objectness[0] == 0;
                for (int k = 0; k < Kind::BOX; ++k) out_boxes[before * Kind::BOX + k] = chunk_boxes[k][thread];
                for (int k = 0; k < Kind::NUMBERS; ++k) kept_shapes[k * most + before] = chunk_shapes[k][thread];
                out_scores[before] = logit ? sigmoid(score) : score;
                out_labels[before] = static_cast<int>(number_of(key) % s.num_classes);
                out_indices[before] = static_cast<int>(number_of(key) / s.num_classes);
            }
            kept = after < most ? after : most;
        }
        done += take;
        bound = run[take - 1];
        __syncthreads();
    }

    if (thread == 0) out_count[image] = kept;
    for (int i = kept + thread; i < most; i += SUPPRESS_THREADS) {
        for (int k = 0; k < Kind::BOX; ++k) out_boxes[i * Kind::BOX + k] = 0.0f;
        out_scores[i] = 0.0f, out_labels[i] = -1, out_indices[i] = -1;
    }
}

}  // namespace fusenms

// ---- The kernels. Their arguments stand as TensorRT gives them to a kernel that it carries in an engine: inputs, numbers, outputs.
//
// Either the settings are an argument, or they are built in (fusenms/engines/plugin.py): then FUSENMS_BAKED are their words,
// FUSENMS_ELEMENT the type of the head's numbers, FUSENMS_KIND Upright or Oriented; and there is an argument more, the picture, which
// TensorRT has to be given for its size.

#define FUSENMS_SELECT(T, source, name)                                                                                           \
    extern "C" __global__ void __launch_bounds__(fusenms::SELECT_THREADS, 1) name(                                                 \
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
