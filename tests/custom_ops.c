/* An ONNX Runtime library with one custom operator, com.example::Scale: its input times the attribute k.

   The interface is that of ONNX Runtime's C API, of which only the functions below are used. Their places in the table never change. If the
   environment variable FUSENMS_OPENED is set, the file of that name is written when the library is opened. */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void *(*Function)(void);
typedef struct { const Function *(*get_api)(uint32_t version); const char *(*get_version)(void); } ApiBase;
enum {
    CREATE_DOMAIN = 26, DOMAIN_ADD = 27, ADD_DOMAIN = 28, TENSOR_DATA = 51, DIMENSIONS_COUNT = 61, DIMENSIONS = 62, ELEMENTS = 64,
    TYPE_AND_SHAPE = 65, FLOAT_ATTRIBUTE = 85, INPUT = 90, OUTPUT = 91, RELEASE_SHAPE = 99, VERSION = 8, FLOAT32 = 1
};
#define CALL(number, ...) ((void *(*)())api[number])(__VA_ARGS__)

static const Function *api;

typedef struct Op Op;
struct Op {
    uint32_t version;
    void *(*create)(const Op *, const Function *, const void *);
    const char *(*name)(const Op *);
    const char *(*provider)(const Op *);
    int (*input_type)(const Op *, size_t);
    size_t (*inputs)(const Op *);
    int (*output_type)(const Op *, size_t);
    size_t (*outputs)(const Op *);
    void (*compute)(void *, void *);
    void (*destroy)(void *);
    int (*input_kind)(const Op *, size_t);
    int (*output_kind)(const Op *, size_t);
};

static void *create(const Op *op, const Function *given, const void *info) {
    float *k = malloc(sizeof *k);
    *k = 1;
    CALL(FLOAT_ATTRIBUTE, info, "k", k);
    return k;
}
static const char *name(const Op *op) { return "Scale"; }
static const char *provider(const Op *op) { return NULL; }
static int type(const Op *op, size_t i) { return FLOAT32; }
static size_t one(const Op *op) { return 1; }
static int required(const Op *op, size_t i) { return 0; }
static void compute(void *kernel, void *context) {
    const void *input = NULL;
    void *info = NULL, *output = NULL;
    float *x = NULL, *y = NULL;
    size_t rank = 0, count = 0;
    int64_t sizes[8];
    CALL(INPUT, context, (size_t)0, &input);
    CALL(TYPE_AND_SHAPE, input, &info);
    CALL(DIMENSIONS_COUNT, info, &rank);
    if (rank > 8) abort();
    CALL(DIMENSIONS, info, sizes, rank);
    CALL(ELEMENTS, info, &count);
    CALL(RELEASE_SHAPE, info);
    CALL(OUTPUT, context, (size_t)0, sizes, rank, &output);
    CALL(TENSOR_DATA, input, (void **)&x);
    CALL(TENSOR_DATA, output, (void **)&y);
    for (size_t i = 0; i < count; i++) y[i] = x[i] * *(float *)kernel;
}

static const Op scale = {VERSION, create, name, provider, type, one, type, one, compute, free, required, required};

void *RegisterCustomOps(void *options, const ApiBase *base) {
    void *domain = NULL;
    const char *opened = getenv("FUSENMS_OPENED");
    FILE *file = opened ? fopen(opened, "w") : NULL;
    if (file) fclose(file);
    api = base->get_api(VERSION);
    CALL(CREATE_DOMAIN, "com.example", &domain);
    CALL(DOMAIN_ADD, domain, &scale);
    return CALL(ADD_DOMAIN, options, domain);
}
