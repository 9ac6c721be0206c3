// The loops over mask words, in terms of what one instruction set provides:
//
//   Draw(key, stream, block_high, threshold).words(block_low, bits)
//                                           64 keep bits in each of kStep words
//   apply64(x, y, bits, scale)              64 elements
//   ByteCounter: add(bits), store(bytes)    64 column counters
//
// No include guard on purpose: the text is compiled once for each instruction
// set, inside its namespace and its target pragma.

inline uint64_t load_word(const uint8_t* packed, int64_t word) {
  uint64_t bits;
  memcpy(&bits, packed + word * 8, 8);
  return little_endian(bits);
}

inline void store_word(uint8_t* packed, int64_t word, uint64_t bits) {
  bits = little_endian(bits);
  memcpy(packed + word * 8, &bits, 8);
}

// The hardware's own prefetching ends with a page, and the rounds of Philox between two
// words keep loads of the next page from starting early.
constexpr size_t kAhead = 2048;

template <class T>
DROPOUT_INLINE void fetch_ahead(const T* x, const T* y) {
  const size_t ahead = kAhead / sizeof(T), line = 64 / sizeof(T);
  for (size_t i = ahead; i < ahead + 64; i += line) {
    __builtin_prefetch(x + i, 0);
    __builtin_prefetch(y + i, 1);
  }
}

template <class T>
DROPOUT_INLINE void apply_word(const MaskArgs& args, int64_t word, uint64_t bits) {
  const T* x = static_cast<const T*>(args.x) + word * 64;
  T* y = static_cast<T*>(args.y) + word * 64;
  const int64_t left = args.numel - word * 64;
  if (left >= 64) {
    fetch_ahead(x, y);
    apply64(x, y, bits, args.scale);
    return;
  }
  T in[64] = {};
  T out[64];
  memcpy(in, x, static_cast<size_t>(left) * sizeof(T));
  apply64(in, out, bits, args.scale);
  memcpy(y, out, static_cast<size_t>(left) * sizeof(T));
}

// Words [begin, end) of the mask; `use(word, bits)` sees each while it is in a
// register.
template <class Use>
DROPOUT_INLINE void draw_words(const MaskArgs& args, int64_t begin, int64_t end,
                               const Use& use) {
  const bool none = args.threshold > UINT32_MAX;
  const uint32_t threshold = static_cast<uint32_t>(args.threshold);
  while (begin < end) {
    // The high half of the block number is a constant of Draw.
    int64_t stop = (begin | ((int64_t{1} << 28) - 1)) + 1;
    if (stop > end) stop = end;
    const Draw draw(static_cast<uint64_t>(args.rng[0]),
                    static_cast<uint64_t>(args.rng[1]),
                    static_cast<uint32_t>(begin >> 28), threshold);
    while (begin < stop) {
      uint64_t bits[Draw::kStep] = {};
      if (!none) draw.words(static_cast<uint32_t>(begin * 16), bits);
      for (int i = 0; i < Draw::kStep && begin < stop; ++i, ++begin) {
        const int64_t left = args.numel - begin * 64;
        if (left < 64) bits[i] &= (uint64_t{1} << left) - 1;
        store_word(args.packed, begin, bits[i]);
        use(begin, bits[i]);
      }
    }
  }
}

template <class T>
void forward_range(const MaskArgs& args, int64_t begin, int64_t end) {
  struct Apply {
    const MaskArgs& args;
    DROPOUT_INLINE void operator()(int64_t word, uint64_t bits) const {
      apply_word<T>(args, word, bits);
    }
  };
  draw_words(args, begin, end, Apply{args});
}

inline void draw_range(const MaskArgs& args, int64_t begin, int64_t end) {
  struct Nothing {
    DROPOUT_INLINE void operator()(int64_t, uint64_t) const {}
  };
  draw_words(args, begin, end, Nothing{});
}

template <class T>
void apply_range(const MaskArgs& args, int64_t begin, int64_t end) {
  for (; begin < end; ++begin) {
    apply_word<T>(args, begin, load_word(args.packed, begin));
  }
}

// 64 bits from any bit position. Past the last word it repeats that word: those
// bits belong to no column.
struct AnyWindow {
  DROPOUT_INLINE uint64_t operator()(const Columns& columns, int64_t bit) const {
    const int64_t word = bit >> 6;
    const int shift = static_cast<int>(bit & 63);
    const int64_t next = word + 1 < columns.num_words ? word + 1 : word;
    return load_word(columns.packed, word) >> shift |
           load_word(columns.packed, next) << 1 << (63 - shift);
  }
};

struct WholeWord {
  DROPOUT_INLINE uint64_t operator()(const Columns& columns, int64_t bit) const {
    return load_word(columns.packed, bit >> 6);
  }
};

DROPOUT_INLINE void add_bytes(const ByteCounter& counter, const Columns& columns,
                              int64_t chunk) {
  uint8_t bytes[64];
  counter.store(bytes);
  int64_t* totals = columns.totals + chunk * 64;
  const int64_t left = columns.width - chunk * 64;
  if (left >= 64) {
    for (int i = 0; i < 64; ++i) totals[i] += bytes[i];
  } else {
    for (int64_t i = 0; i < left; ++i) totals[i] += bytes[i];
  }
}

// Column sums of `kChunks` neighbouring chunks of 64 columns, in bytes for as many
// rows as a byte can count. Neighbours share cache lines, and rows whose length is a
// power of two share cache sets: a line had better be used while it is there.
template <int kChunks, class Window>
DROPOUT_INLINE void count_chunks(const Columns& columns, int64_t chunk,
                                 const Window& window) {
  constexpr int64_t kByteRows = 255;
  for (int64_t row = 0; row < columns.rows; row += kByteRows) {
    const int64_t left = columns.rows - row;
    const int64_t rows = left < kByteRows ? left : kByteRows;
    int64_t bit = columns.first_bit + row * columns.width + chunk * 64;
    ByteCounter counters[kChunks];
    for (int64_t r = 0; r < rows; ++r, bit += columns.width) {
#pragma GCC unroll 4
      for (int i = 0; i < kChunks; ++i) {
        counters[i].add(window(columns, bit + 64 * i));
      }
    }
    for (int i = 0; i < kChunks; ++i) add_bytes(counters[i], columns, chunk + i);
  }
}

template <class Window>
DROPOUT_INLINE void count_with(const Columns& columns, int64_t begin, int64_t end,
                               const Window& window) {
  for (; begin + 4 <= end; begin += 4) count_chunks<4>(columns, begin, window);
  for (; begin < end; ++begin) count_chunks<1>(columns, begin, window);
}

inline void count_range(const Columns& columns, int64_t begin, int64_t end) {
  if (columns.first_bit % 64 == 0 && columns.width % 64 == 0) {
    count_with(columns, begin, end, WholeWord{});
  } else {
    count_with(columns, begin, end, AnyWindow{});
  }
}

// Indexed by Dtype.
constexpr Kernels kernels = {
    {forward_range<float>, forward_range<double>, forward_range<BFloat16>,
     forward_range<Half>},
    {apply_range<float>, apply_range<double>, apply_range<BFloat16>,
     apply_range<Half>},
    draw_range,
    count_range};
