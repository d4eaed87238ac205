# llama.cpp's "common" library is only needed by its command-line tools, and takes half of the build. The binding
# forces the option on in the cache; a normal variable, set when the project starts, goes before the cache.
set(LLAMA_BUILD_COMMON OFF)
