"""Latency, measured on this machine: milliseconds, of CPU time where torch has one thread.

Where it has more, they are of the time that passes.

What is modelled. A plan takes

    fixed + sum over groups of cost(group, precision) + sum over edges of change(formats)

- Every layer, with what the target fuses behind it, is cut out of the graph and run in the target's
  runtime at each of its candidates, on the shapes that it has in the example; layers that compute
  the same on equal shapes are measured once. What a call takes whatever it computes, the time of a
  layer of one weight, is taken off.
- A layer alone also quantizes its input, returns real numbers and brings both into the
  runtime's layout, which neighbours in a model do not do for each other. Pairs of neighbours that
  may hand codes to each other are measured too, with what lies between them, also where the one's
  result is only added to the other's: what both together take less than each alone is taken off,
  one half each. What they take more where one is on codes and the other is not is the edge between
  their groups: conversions, and kernels that fall back to float because what they write is read in
  float.
- The whole model is measured at one uniform plan a precision. What it takes beyond its layers
  (norms, softmax, products of attention, sums) is the fixed part; what then still
  differs is put on the groups in proportion. So a uniform plan costs what was measured; of
  mixed plans nothing was.

Runs take turns, and each one's least time of thirty rounds counts. Times are kept on disk
(`cache_folder`), under all that decides them: the versions of the runtime, torch and fxmpq, CPU,
threads, what a target tells besides (the C++ compiler), precisions, and what is computed on which
shapes.
"""
