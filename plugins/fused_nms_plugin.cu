// `FusedNMS` as a TensorRT plugin library (TensorRT 10 and newer): for trtexec --staticPlugins, Triton, DeepStream, or any program that
// opens it before it builds or runs an engine. `make plugin TENSORRT_ROOT=...` makes it. README.md beside this file says more.
//
// Inputs of the node: picture (for its size; `classes` again, where the size is among the attributes), classes, boxes, objectness,
// background, angle, as fusenms/backends/plugin.py lists them; float32 or float16. Its attributes are the kernels' settings.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "fused_nms.cu"

namespace {

using namespace nvinfer1;
using fusenms::Settings;

constexpr char const* NAME = "FusedNMS";
constexpr char const* VERSION = "1";
constexpr char const* NAMESPACE = "fusenms";
constexpr char const* SETTINGS = "settings";  // as the field of an engine
enum Input { PICTURE, CLASSES, BOXES, OBJECTNESS, BACKGROUND, ANGLE, INPUTS };
enum Output { COUNT, OUT_BOXES, SCORES, LABELS, INDICES, OUTPUTS };

struct Field {
    char const* name;
    size_t offset;
    int32_t count;
    PluginFieldType type;
};

template <typename T>
constexpr PluginFieldType field_type();
template <>
constexpr PluginFieldType field_type<int>() {
    return PluginFieldType::kINT32;
}
template <>
constexpr PluginFieldType field_type<float>() {
    return PluginFieldType::kFLOAT32;
}

constexpr Field FIELDS[] = {
#define ONE(type, name) {#name, offsetof(Settings, name), 1, field_type<type>()},
#define MANY(type, name, count) {#name, offsetof(Settings, name), count, field_type<type>()},
    FUSENMS_SETTINGS(ONE, MANY)
#undef ONE
#undef MANY
};

void log_error(std::string const& text) {
    if (ILogger* logger = getLogger()) logger->log(ILogger::Severity::kERROR, ("FusedNMS: " + text).c_str());
}

// What the kernels use for themselves, one after the other.
struct Workspace {
    size_t keys, counts, decoded, kept, total;

    Workspace(Settings const& s, int64_t images, int64_t candidates) {
        auto const aligned = [](int64_t bytes) { return static_cast<size_t>((bytes + 255) / 256 * 256); };
        int64_t const tiles = (candidates + fusenms::TILE - 1) / fusenms::TILE, each = s.multi_label ? s.num_classes : 1;
        keys = aligned(images * candidates * each * sizeof(fusenms::Key));
        counts = aligned(images * tiles * sizeof(int));
        decoded = aligned(images * candidates * (s.angle[0] ? 5 : 4) * sizeof(float));
        kept = aligned(images * fusenms::MOST_NUMBERS * s.max_detections * sizeof(float));
        total = keys + counts + decoded + kept;
    }
};

// Plugin and creator say alike what they are.
template <typename Interface>
class Named : public Interface {
public:
    AsciiChar const* getPluginName() const noexcept override {
        return NAME;
    }

    AsciiChar const* getPluginVersion() const noexcept override {
        return VERSION;
    }

    AsciiChar const* getPluginNamespace() const noexcept override {
        return NAMESPACE;
    }
};

class FusedNms : public IPluginV3, public Named<IPluginV3OneCore>, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit FusedNms(Settings const& settings) : settings_(settings), field_(SETTINGS, &settings_, PluginFieldType::kUNKNOWN, sizeof(Settings)) {
        fields_ = {1, &field_};
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild*>(this);
        if (type == PluginCapabilityType::kRUNTIME) return static_cast<IPluginV3OneRuntime*>(this);
        return static_cast<IPluginV3OneCore*>(this);
    }

    IPluginV3* clone() noexcept override {
        return new (std::nothrow) FusedNms(settings_);
    }

    int32_t getNbOutputs() const noexcept override {
        return OUTPUTS;
    }

    int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const*, int32_t inputs) const noexcept override {
        if (inputs != INPUTS || outputs != OUTPUTS) return -1;
        for (int i = 0; i < OUTPUTS; ++i) types[i] = i == OUT_BOXES || i == SCORES ? DataType::kFLOAT : DataType::kINT32;
        return 0;
    }

    int32_t getOutputShapes(
        DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out, int32_t outputs, IExprBuilder& expr) noexcept override {
        if (inputs != INPUTS || outputs != OUTPUTS) return -1;
        for (int i = 0; i < OUTPUTS; ++i) {
            out[i].nbDims = i == OUT_BOXES ? 3 : 2;
            out[i].d[0] = in[CLASSES].d[0];
            out[i].d[1] = expr.constant(i == COUNT ? 1 : settings_.max_detections);
        }
        out[OUT_BOXES].d[2] = expr.constant(settings_.angle[0] ? 5 : 4);
        return 0;
    }

    // The head in one type, whichever; the picture in the type that it has, since it is not read.
    bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* all, int32_t, int32_t) noexcept override {
        PluginTensorDesc const& desc = all[at].desc;
        if (desc.format != TensorFormat::kLINEAR) return false;
        bool const real = desc.type == DataType::kFLOAT || desc.type == DataType::kHALF;
        if (at == PICTURE || at == CLASSES) return real;
        if (at < INPUTS) return desc.type == all[CLASSES].desc.type;
        int const output = at - INPUTS;
        return desc.type == (output == OUT_BOXES || output == SCORES ? DataType::kFLOAT : DataType::kINT32);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override {
        return 0;
    }

    size_t getWorkspaceSize(
        DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*, int32_t) const noexcept override {
        Dims const& most = in[CLASSES].max;
        return Workspace(settings_, most.d[0], most.d[3 - settings_.classes[0]]).total;
    }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
        Dims const &classes = in[CLASSES].dims, &boxes = in[BOXES].dims;
        if (classes.nbDims == 3 && boxes.nbDims == 3 && classes.d[settings_.classes[0]] == settings_.classes[1] &&
            boxes.d[settings_.boxes[0]] == settings_.boxes[1] && classes.d[3 - settings_.classes[0]] == boxes.d[3 - settings_.boxes[0]])
            return 0;
        log_error("the head's tensors do not have the shapes that the node's attributes say; fuse the weights again");
        return -1;
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
        return clone();
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        return &fields_;
    }

    int32_t enqueue(
        PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) noexcept override {
        return in[CLASSES].type == DataType::kHALF ? launch<fusenms::Half>(fused_nms_select_half, in, inputs, outputs, workspace, stream)
                                                   : launch<float>(fused_nms_select_float, in, inputs, outputs, workspace, stream);
    }

private:
    template <typename T, typename Select>
    int32_t launch(
        Select select, PluginTensorDesc const* in, void const* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) const {
        Settings const& s = settings_;
        int const images = static_cast<int>(in[CLASSES].dims.d[0]), candidates = static_cast<int>(in[CLASSES].dims.d[3 - s.classes[0]]);
        int const height = s.height ? s.height : static_cast<int>(in[PICTURE].dims.d[2]);
        int const width = s.width ? s.width : static_cast<int>(in[PICTURE].dims.d[3]);
        Workspace const parts(s, images, candidates);
        char* const at = static_cast<char*>(workspace);
        auto* const keys = reinterpret_cast<fusenms::Key*>(at);
        auto* const counts = reinterpret_cast<int*>(at + parts.keys);
        auto* const decoded = reinterpret_cast<float*>(at + parts.keys + parts.counts);
        auto* const kept = reinterpret_cast<float*>(at + parts.keys + parts.counts + parts.decoded);
        auto const head = [&](Input i) { return static_cast<T const*>(inputs[i]); };
        dim3 const tiles((candidates + fusenms::TILE - 1) / fusenms::TILE, images);
        select<<<tiles, fusenms::SELECT_THREADS, 0, stream>>>(
            s, head(CLASSES), head(OBJECTNESS), head(BACKGROUND), head(BOXES), head(ANGLE), candidates, height, width, keys, counts,
            decoded);
        auto const suppress = s.angle[0] ? fused_nms_suppress_oriented : fused_nms_suppress_upright;
        suppress<<<images, fusenms::SUPPRESS_THREADS, 0, stream>>>(
            s, keys, counts, decoded, candidates, static_cast<int*>(outputs[COUNT]), static_cast<float*>(outputs[OUT_BOXES]),
            static_cast<float*>(outputs[SCORES]), static_cast<int*>(outputs[LABELS]), static_cast<int*>(outputs[INDICES]), kept);
        cudaError_t const error = cudaPeekAtLastError();
        if (error != cudaSuccess) log_error(cudaGetErrorString(error));
        return error == cudaSuccess ? 0 : -1;
    }

    Settings settings_;
    PluginField field_;
    PluginFieldCollection fields_{};
};

class FusedNmsCreator : public Named<IPluginCreatorV3One> {
public:
    FusedNmsCreator() {
        for (Field const& field : FIELDS) names_.emplace_back(field.name, nullptr, field.type, field.count);
        fields_ = {static_cast<int32_t>(names_.size()), names_.data()};
    }

    PluginFieldCollection const* getFieldNames() noexcept override {
        return &fields_;
    }

    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
        Settings settings{};
        if (PluginField const* whole = find(*given, SETTINGS)) {  // of an engine
            if (whole->length != sizeof settings) {
                log_error("the engine was built with another version of this plugin; build it again");
                return nullptr;
            }
            std::memcpy(&settings, whole->data, sizeof settings);
            return new (std::nothrow) FusedNms(settings);
        }
        for (Field const& field : FIELDS) {
            PluginField const* found = find(*given, field.name);
            if (!found || found->type != field.type || found->length != field.count) {
                log_error(std::string("attribute ") + field.name + " is missing or not what fusenms writes; fuse the weights again");
                return nullptr;
            }
            std::memcpy(reinterpret_cast<char*>(&settings) + field.offset, found->data, field.count * sizeof(int32_t));
        }
        return new (std::nothrow) FusedNms(settings);
    }

private:
    static PluginField const* find(PluginFieldCollection const& fields, char const* name) {
        for (int32_t i = 0; i < fields.nbFields; ++i)
            if (std::strcmp(fields.fields[i].name, name) == 0) return &fields.fields[i];
        return nullptr;
    }

    std::vector<PluginField> names_;
    PluginFieldCollection fields_{};
};

struct Registration {
    FusedNmsCreator creator;

    Registration() {
        getPluginRegistry()->registerCreator(creator, NAMESPACE);
    }
} registration;

}  // namespace
