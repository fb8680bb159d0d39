// `FusedNMS` as a TensorRT plugin library: for trtexec --staticPlugins, Triton, DeepStream, or any program that opens it before it builds or
// runs an engine. `make plugin TENSORRT_ROOT=...` makes it. README.md beside this file says more.
//
// TensorRT 10 and newer have IPluginV3, older ones (from 8.5 on) IPluginV2DynamicExt: `Node` is what both have in common.
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

// The node: its settings, which tensors it takes and gives, and its kernels.
class Node {
public:
    explicit Node(Settings const& settings) : settings_(settings) {}

protected:
    void output_shape(int32_t output, DimsExprs const* in, DimsExprs& out, IExprBuilder& expr) const {
        out.nbDims = output == OUT_BOXES ? 3 : 2;
        out.d[0] = in[CLASSES].d[0];
        out.d[1] = expr.constant(output == COUNT ? 1 : settings_.max_detections);
        if (output == OUT_BOXES) out.d[2] = expr.constant(settings_.angle[0] ? 5 : 4);
    }

    static DataType output_type(int32_t output) {
        return output == OUT_BOXES || output == SCORES ? DataType::kFLOAT : DataType::kINT32;
    }

    // The head in one type, whichever; the picture in the type that it has, since it is not read.
    static bool supports(int32_t at, PluginTensorDesc const& desc, PluginTensorDesc const& classes) {
        if (desc.format != TensorFormat::kLINEAR) return false;
        if (at == PICTURE || at == CLASSES) return desc.type == DataType::kFLOAT || desc.type == DataType::kHALF;
        return desc.type == (at < INPUTS ? classes.type : output_type(at - INPUTS));
    }

    size_t workspace_size(Dims const& classes) const {
        return Workspace(settings_, classes.d[0], classes.d[3 - settings_.classes[0]]).total;
    }

    bool shapes_fit(PluginTensorDesc const* in) const {
        Dims const &classes = in[CLASSES].dims, &boxes = in[BOXES].dims;
        if (classes.nbDims == 3 && boxes.nbDims == 3 && classes.d[settings_.classes[0]] == settings_.classes[1] &&
            boxes.d[settings_.boxes[0]] == settings_.boxes[1] && classes.d[3 - settings_.classes[0]] == boxes.d[3 - settings_.boxes[0]])
            return true;
        log_error("the head's tensors do not have the shapes that the node's attributes say; fuse the weights again");
        return false;
    }

    int32_t run(PluginTensorDesc const* in, void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) const {
        return in[CLASSES].type == DataType::kHALF ? launch<fusenms::Half>(fused_nms_select_half, in, inputs, outputs, workspace, stream)
                                                   : launch<float>(fused_nms_select_float, in, inputs, outputs, workspace, stream);
    }

    Settings settings_;

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
};

PluginField const* find(PluginFieldCollection const& fields, char const* name) {
    for (int32_t i = 0; i < fields.nbFields; ++i)
        if (std::strcmp(fields.fields[i].name, name) == 0) return &fields.fields[i];
    return nullptr;
}

// Settings from the attributes of a node; false where one is missing.
bool read_attributes(PluginFieldCollection const& given, Settings& settings) {
    for (Field const& field : FIELDS) {
        PluginField const* found = find(given, field.name);
        if (!found || found->type != field.type || found->length != field.count) {
            log_error(std::string("attribute ") + field.name + " is missing or not what fusenms writes; fuse the weights again");
            return false;
        }
        std::memcpy(reinterpret_cast<char*>(&settings) + field.offset, found->data, field.count * sizeof(int32_t));
    }
    return true;
}

// Settings that an engine stores; false where its plugin was another version.
bool read_stored(void const* data, size_t length, Settings& settings) {
    if (length == sizeof settings) {
        std::memcpy(&settings, data, sizeof settings);
        return true;
    }
    log_error("the engine was built with another version of this plugin; build it again");
    return false;
}

// What a creator says of the attributes.
class FieldNames {
public:
    FieldNames() {
        for (Field const& field : FIELDS) names_.emplace_back(field.name, nullptr, field.type, field.count);
        fields_ = {static_cast<int32_t>(names_.size()), names_.data()};
    }

    PluginFieldCollection const* get() const {
        return &fields_;
    }

private:
    std::vector<PluginField> names_;
    PluginFieldCollection fields_{};
};

// Plugin and creator say alike what they are.
template <typename Interface>
class Named : public Interface {
public:
    AsciiChar const* getPluginVersion() const noexcept override {
        return VERSION;
    }

    AsciiChar const* getPluginNamespace() const noexcept override {
        return NAMESPACE;
    }
};

#if NV_TENSORRT_MAJOR >= 10

constexpr char const* SETTINGS = "settings";  // as the field of an engine

class FusedNms : public IPluginV3, public Named<IPluginV3OneCore>, public IPluginV3OneBuild, public IPluginV3OneRuntime, Node {
public:
    explicit FusedNms(Settings const& settings) : Node(settings), field_(SETTINGS, &settings_, PluginFieldType::kUNKNOWN, sizeof(Settings)) {
        fields_ = {1, &field_};
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild*>(this);
        if (type == PluginCapabilityType::kRUNTIME) return static_cast<IPluginV3OneRuntime*>(this);
        return static_cast<IPluginV3OneCore*>(this);
    }

    AsciiChar const* getPluginName() const noexcept override {
        return NAME;
    }

    IPluginV3* clone() noexcept override {
        return new (std::nothrow) FusedNms(settings_);
    }

    int32_t getNbOutputs() const noexcept override {
        return OUTPUTS;
    }

    int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const*, int32_t inputs) const noexcept override {
        if (inputs != INPUTS || outputs != OUTPUTS) return -1;
        for (int32_t i = 0; i < OUTPUTS; ++i) types[i] = output_type(i);
        return 0;
    }

    int32_t getOutputShapes(
        DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out, int32_t outputs, IExprBuilder& expr) noexcept override {
        if (inputs != INPUTS || outputs != OUTPUTS) return -1;
        for (int32_t i = 0; i < OUTPUTS; ++i) output_shape(i, in, out[i], expr);
        return 0;
    }

    bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* all, int32_t, int32_t) noexcept override {
        return supports(at, all[at].desc, all[CLASSES].desc);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override {
        return 0;
    }

    size_t getWorkspaceSize(
        DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*, int32_t) const noexcept override {
        return workspace_size(in[CLASSES].max);
    }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
        return shapes_fit(in) ? 0 : -1;
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
        return run(in, inputs, outputs, workspace, stream);
    }

private:
    PluginField field_;
    PluginFieldCollection fields_{};
};

class FusedNmsCreator : public Named<IPluginCreatorV3One> {
public:
    AsciiChar const* getPluginName() const noexcept override {
        return NAME;
    }

    PluginFieldCollection const* getFieldNames() noexcept override {
        return names_.get();
    }

    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
        Settings settings{};
        PluginField const* stored = find(*given, SETTINGS);  // of an engine
        bool const good = stored ? read_stored(stored->data, stored->length, settings) : read_attributes(*given, settings);
        return good ? new (std::nothrow) FusedNms(settings) : nullptr;
    }

private:
    FieldNames names_;
};

#else

class FusedNms : public Named<IPluginV2DynamicExt>, Node {
public:
    explicit FusedNms(Settings const& settings) : Node(settings) {}

    AsciiChar const* getPluginType() const noexcept override {
        return NAME;
    }

    void setPluginNamespace(AsciiChar const*) noexcept override {}

    IPluginV2DynamicExt* clone() const noexcept override {
        return new (std::nothrow) FusedNms(settings_);
    }

    int32_t initialize() noexcept override {
        return 0;
    }

    void terminate() noexcept override {}

    void destroy() noexcept override {
        delete this;
    }

    int32_t getNbOutputs() const noexcept override {
        return OUTPUTS;
    }

    DataType getOutputDataType(int32_t output, DataType const*, int32_t) const noexcept override {
        return output_type(output);
    }

    DimsExprs getOutputDimensions(int32_t output, DimsExprs const* in, int32_t, IExprBuilder& expr) noexcept override {
        DimsExprs out{};
        output_shape(output, in, out, expr);
        return out;
    }

    bool supportsFormatCombination(int32_t at, PluginTensorDesc const* all, int32_t, int32_t) noexcept override {
        return supports(at, all[at], all[CLASSES]);
    }

    void configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override {}

    size_t getWorkspaceSize(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) const noexcept override {
        return workspace_size(in[CLASSES].dims);
    }

    size_t getSerializationSize() const noexcept override {
        return sizeof settings_;
    }

    void serialize(void* buffer) const noexcept override {
        std::memcpy(buffer, &settings_, sizeof settings_);
    }

    int32_t enqueue(
        PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) noexcept override {
        return shapes_fit(in) ? run(in, inputs, outputs, workspace, stream) : -1;
    }
};

class FusedNmsCreator : public Named<IPluginCreator> {
public:
    AsciiChar const* getPluginName() const noexcept override {
        return NAME;
    }

    void setPluginNamespace(AsciiChar const*) noexcept override {}

    PluginFieldCollection const* getFieldNames() noexcept override {
        return names_.get();
    }

    IPluginV2* createPlugin(AsciiChar const*, PluginFieldCollection const* given) noexcept override {
        Settings settings{};
        return read_attributes(*given, settings) ? new (std::nothrow) FusedNms(settings) : nullptr;
    }

    IPluginV2* deserializePlugin(AsciiChar const*, void const* data, size_t length) noexcept override {
        Settings settings{};
        return read_stored(data, length, settings) ? new (std::nothrow) FusedNms(settings) : nullptr;
    }

private:
    FieldNames names_;
};

#endif

struct Registration {
    FusedNmsCreator creator;

    Registration() {
        getPluginRegistry()->registerCreator(creator, NAMESPACE);
    }
} registration;

}  // namespace
