#include <math.h>
#include <stdint.h>

// exp to 4 units in the last place, in a form that compilers vectorise; NaN stays NaN.
static inline float fast_exp(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = nearbyintf(x * 1.44269504f), r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1.39304355e-3f;
    p = p * r + 8.33336077e-3f;
    p = p * r + 4.16664853e-2f;
    p = p * r + 0.166666672f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    union {
        int32_t bits;
        float value;
    } power = {.bits = ((int32_t)n + 127) << 23};
    return p * power.value;
}
