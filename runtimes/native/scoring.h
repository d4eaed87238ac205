// Compare a model with a reference folder: logits come down to a few numbers a token (edgestill/runtimes/scoring.py).
#pragma once

#include "exchange.h"
#include "model.h"

#include <string>

// {name: tensor reference}; the reduction is computed in float64.
json score(Model & model, Exchange & exchange, const std::string & reference, int64_t batch_size);
