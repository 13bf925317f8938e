// What gated delta nets do to their gates.

inline float sigmoid(float x) { return 1 / (1 + exp(-x)); }
inline float softplus(float x) { return max(x, 0.0f) + log(1 + exp(-fabs(x))); }
