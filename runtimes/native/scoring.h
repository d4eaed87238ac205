// Compare a model with a reference folder: logits come down to a few numbers a token (edgestill/runtimes/scoring.py).
#pragma once

#include "engine.h"
#include "exchange.h"

#include <string>

// {name: tensor reference}; the reduction is computed in float64.
json score(Engine & model, Exchange & exchange, const std::string & reference, int64_t batch_size);
