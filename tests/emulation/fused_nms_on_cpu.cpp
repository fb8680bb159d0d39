// The kernels of plugins/fused_nms.cu as a library for tests, with the layout of their settings.
#include <algorithm>
#include <cstddef>

#include "cuda_on_cpu.h"

#include "fused_nms.cu"

using fusenms::Key;
using fusenms::Settings;

namespace {

template <typename Select, typename Suppress, typename T>
void run(
    Select select, Suppress suppress, const Settings& settings, unsigned seed, int images, int candidates, int height, int width,
    const T* classes, const T* objectness, const T* background, const T* boxes, const T* angles, Key* keys, int* counts,
    float* decoded, int* count, float* out_boxes, float* scores, int* labels, int* indices, float* kept) {
    const unsigned tiles = static_cast<unsigned>((candidates + fusenms::TILE - 1) / fusenms::TILE);
    emulation::launch({tiles, static_cast<unsigned>(images), 1}, fusenms::SELECT_THREADS, seed, [=, &settings] {
        select(settings, classes, objectness, background, boxes, angles, candidates, height, width, keys, counts, decoded);
    });
    emulation::launch({static_cast<unsigned>(images), 1, 1}, fusenms::SUPPRESS_THREADS, seed + 1, [=, &settings] {
        suppress(settings, keys, counts, decoded, candidates, count, out_boxes, scores, labels, indices, kept);
    });
}

}  // namespace

#define RUN_AS(T, kind, suffix)                                                                                                   \
    extern "C" void run_##kind##_##suffix(                                                                                         \
        const Settings* settings, unsigned seed, int images, int candidates, int height, int width, const T* classes,              \
        const T* objectness, const T* background, const T* boxes, const T* angles, Key* keys, int* counts, float* decoded,         \
        int* count, float* out_boxes, float* scores, int* labels, int* indices, float* kept) {                                     \
        run(fused_nms_select_##suffix, fused_nms_suppress_##kind, *settings, seed, images, candidates, height, width, classes,     \
            objectness, background, boxes, angles, keys, counts, decoded, count, out_boxes, scores, labels, indices, kept);        \
    }

RUN_AS(float, upright, float)
RUN_AS(fusenms::Half, upright, half)
RUN_AS(float, oriented, float)
RUN_AS(fusenms::Half, oriented, half)

// One line for each setting: name, type, count, offset in bytes; then the size of them all.
extern "C" const char* describe_settings() {
    static char text[4096];
    int at = 0;
#define ONE(type, name) at += std::snprintf(text + at, sizeof text - at, "%s %s 1 %zu\n", #name, #type, offsetof(Settings, name));
#define MANY(type, name, count) \
    at += std::snprintf(text + at, sizeof text - at, "%s %s %d %zu\n", #name, #type, count, offsetof(Settings, name));
    FUSENMS_SETTINGS(ONE, MANY)
    std::snprintf(text + at, sizeof text - at, "size %zu\n", sizeof(Settings));
    return text;
}
